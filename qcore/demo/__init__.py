"""The demo's real model and real data: small enough to commit, made by `train_digits.py` and `make_data.py`.

Nothing is imported here: the data needs scikit-learn, the training needs torch, and reading the model needs neither.
"""
