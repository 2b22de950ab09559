"""How far cached images are from uncached ones: `python evaluate.py --path RUN`."""

from harmonica.commands import evaluate

if __name__ == "__main__":
    evaluate()
