"""Sample images, plainly or by replaying a router: `python sample.py --path RUN`."""

from harmonica.config import SampleConfig, parse
from harmonica.errors import run_command


def sample() -> None:
    config = parse(SampleConfig, "Sample with and without a caching router.")
    from harmonica.report import sample_and_report  # heavy; not needed for --help and --dry-run

    print(sample_and_report(config))


def main() -> None:
    run_command(sample)


if __name__ == "__main__":
    main()
