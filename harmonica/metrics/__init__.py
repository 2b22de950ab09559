"""How good images are: beside a reference set, a prompt, or the uncached image of their seed."""

# Scores of a set of images, as the evaluation suite of ADM defines them (Dhariwal & Nichol, 2021).
NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
METRICS = tuple(NAMES)
EXTRACTORS = ("inception", "cifar")
