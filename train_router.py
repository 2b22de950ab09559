"""Train a caching router: `python train_router.py`, or torchrun for several processes."""

from harmonica.commands import train

if __name__ == "__main__":
    train()
