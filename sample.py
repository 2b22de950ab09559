"""Sample images, plainly or by replaying a router: `python sample.py --path RUN`."""

from harmonica.commands import sample

if __name__ == "__main__":
    sample()
