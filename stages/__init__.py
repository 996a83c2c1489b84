"""One verb a file: prepare, train_teacher, encode, train_student, sample, evaluate. No click, no ray.

Stages work on each other's stores and checkpoints, and do not import each other. What several of them need is in
`training.py` (the training loop), `checkpoint.py`, `splits.py` (the two sample stores), `section.py` (the base of their
config), `progress.py` and `errors.py`.
"""
