"""How good images are: `python evaluate.py --samples FILE --reference FILE`, or `--path RUN`."""

from harmonica.commands import evaluate

if __name__ == "__main__":
    evaluate()
