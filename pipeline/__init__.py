"""samfed: federated segmentation from few labels, guided by a Segment Anything teacher.

Imports flow one way: ``cli`` -> stages -> parts -> stores, config, errors. Stage one
(``precompute``) never imports stage two (``federation``), and stage two never imports ``sam``.

=================  ==========================================================================
stages             ``synthetic`` ``prepare`` ``sam.finetune`` ``sam.evaluate`` ``precompute``
                   ``federation`` ``evaluation`` ``report`` ``gallery`` ``demo`` ``maintenance``
parts              ``partition`` ``sam`` ``labeller`` ``labelling`` ``cluster`` ``labelled``
                   ``cohort`` ``models`` ``augment`` ``losses`` ``agreement`` ``training``
                   ``aggregation`` ``engines`` ``metrics`` ``pages``
on disk            ``images`` (files of the user), ``stores`` (zarr), ``card``, ``runs``
ground             ``config`` ``errors`` ``files`` ``locks`` ``devices`` ``torchvision_ops``
=================  ==========================================================================
"""

__version__ = "0.1.0"
