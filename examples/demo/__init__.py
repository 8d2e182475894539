"""``make demo``: meta-train on letters, compare with fine-tuning on scripts never seen, draw a picture.

``training`` is the part to copy from: a MAML training loop. ``evaluation`` tests what was trained,
``sinusoid`` is the regression example of the paper, ``picture`` draws, ``__main__`` is the command line.
"""
