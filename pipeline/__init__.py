"""samfed: federated segmentation from few labels, guided by a Segment Anything teacher.

Rooms, from top to bottom. A room imports only rooms below it (``tests/test_rooms.py`` holds that);
``labelling`` and ``federation`` do not know each other, and ``federation`` does not know ``sam``.

``results``
    reads finished runs: scores, comparisons, the report, the teacher's page, the demo
``inference``
    uses finished models: masks of new images, files that leave the house
``setup``
    before the first command: what suits a folder, and whether everything fits
``labelling``
    stage one: the teacher labels every client's images, once
``federation``
    stage two: federated rounds on the cached labels
``sam``
    the teacher: built, adapted, prompted, exported, run
``data``
    a user's folder becomes a partition and image stores
``stores``
    what lies in ``cache/``: image stores, label stores, the teacher's card
``segmentation``
    networks, augmentation, losses, metrics
``config`` ``errors`` ``disk`` ``runtime``
    the ground: settings, errors, files and locks, devices
"""

__version__ = "0.1.0"
