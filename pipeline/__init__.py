"""samfed: federated segmentation from few labels, guided by a Segment Anything teacher.

Imports flow one way: ``cli`` -> stages -> parts -> stores, config, errors. Stage one
(``precompute``) never imports stage two (``federation``), and stage two never imports ``sam``.

=================  ==========================================================================
stages             ``synthetic`` ``prepare`` ``sam.finetune`` ``sam.evaluate`` ``precompute``
                   ``federation`` ``evaluation`` ``comparison`` ``report`` ``gallery`` ``demo``
                   ``maintenance`` ``repair``
parts, stage one   ``partition`` ``sam`` ``labeller`` ``labelling`` ``cluster`` ``labelled``
parts, stage two   ``averaging`` ``exchange`` ``starts`` ``cohort`` ``schedule`` ``diagnostics``
                   ``training`` ``agreement`` ``views`` ``aggregation`` ``distillation``
                   ``distillation_losses`` ``engines`` ``final``
parts of both      ``models`` ``augment`` ``losses`` ``metrics`` ``pages`` ``curves``
on disk            ``images`` (files of the user), ``stores`` (zarr), ``card``, ``runs``
ground             ``config`` ``errors`` ``files`` ``locks`` ``devices`` ``torchvision_ops``
=================  ==========================================================================
"""

__version__ = "0.1.0"
