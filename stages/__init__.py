"""One verb a file: prepare, train_teacher, encode, train_student, sample, evaluate. No click, no ray.

Stages meet only through stores and checkpoints and do not import each other. What several of them need is in
`training.py` (the one training loop), `checkpoint.py`, `section.py` (the base of their config) and `progress.py`.
"""
