"""The ``mmgen`` command: what there is to do besides training."""
