"""Fetch published weights: `python download.py DiT-XL/2 --image-size 512`."""

from harmonica.commands import download

if __name__ == "__main__":
    download()
