"""What runs on a worker: data, training, ranking, trials, the long fine-tune and export.

Importing this package, or `trainables.settings`, imports no torch.
"""
