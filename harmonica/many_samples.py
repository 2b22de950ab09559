"""Many images by many processes: what ``sample.py --num-samples`` does.

Processes share nothing but a folder, so none waits for another and any may be stopped: what a
sample is follows from its index, and who finds its shard missing makes it.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harmonica.autoencoder import load_decoder
from harmonica.backbone import check_gpus, load_backbone
from harmonica.baselines import Plan
from harmonica.engine import Engine
from harmonica.errors import HarmonicaError, Interrupted
from harmonica.interruption import Interruption
from harmonica.lock import held
from harmonica.options import plain
from harmonica.output import make_folder
from harmonica.plans import choose_plan
from harmonica.randomness import Draws
from harmonica.report import check_classes
from harmonica.sample_config import NOT_OF_THE_IMAGES, SampleConfig
from harmonica.sampling import check_finite, eight_bit, sample
from harmonica.shards import DamagedShard, Origin, Shard, ShardFolder, divide

POLL_S = 0.5
# Always images per second, whose inverse tqdm shows where one takes longer than that.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Rank:
    """Which of the processes that share the work this is, as torchrun and accelerate say it."""

    number: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> "Rank":
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))

    @property
    def is_main(self) -> bool:
        return self.number == 0

    @property
    def device(self) -> torch.device:
        """A GPU of its own, if there are any."""
        return (
            torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")
        )


@dataclass(frozen=True)
class Maker:
    """Makes the images of any sample indices.

    On a CPU every image is computed by itself, by one thread: so it is the same, bit for bit,
    whatever the batch size and the number of processes, and it takes no longer there.
    """

    plan: Plan
    decode: Callable[[Tensor], Tensor]
    engine: Engine
    draws: Draws
    classes: tuple[int, ...]
    batch_size: int

    def __call__(self, indices: range, after: Callable[[int], None]) -> np.ndarray:
        """Images (n, H, W, 3) uint8; ``after`` is called with the number done after every batch.

        Raises:
            HarmonicaError: one is not finite.
        """
        done = []
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            done.append(self._batch(batch))
            after(start + len(batch))
        return np.concatenate(done)

    def _batch(self, indices: range) -> np.ndarray:
        # What is compiled or captured is for one shape: a smaller batch is filled up.
        filled = [*indices, *[indices[-1]] * (self.batch_size - len(indices))]
        labels = torch.tensor([self.classes[index % len(self.classes)] for index in filled])
        plan = self.plan
        latents = sample(
            plan.backbone, plan.schedule, self.draws, filled, labels, len(filled), None, self.engine
        )[: len(indices)]
        images = self.decode(latents)
        check_finite(latents, images, indices)
        return eight_bit(images).permute(0, 2, 3, 1).contiguous().numpy()


def _prepare(config: SampleConfig, rank: Rank) -> tuple[Maker, Origin]:
    device = rank.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backbone = load_backbone(config, device)
    conditions = backbone.conditions
    check_classes(config, conditions.count)
    decode = load_decoder(config, device)  # refuses before anything is sampled
    chosen = choose_plan(config, backbone)
    plan = Plan(backbone) if chosen is None else chosen[1]
    options = {k: v for k, v in plain(config).items() if k not in NOT_OF_THE_IMAGES}
    origin = Origin(
        {
            **options,
            "method": None if config.method is None else f"{config.method} {plan.setting}".strip(),
            "prompts": conditions.content_hash(),
            "compile": backbone.how.compiles,
        },
        backbone.weights_hash,
        None if plan.schedule is None else plan.schedule.hash,
        decode.weights_hash(),
        device.type,
    )
    maker = Maker(
        plan,
        decode,
        Engine(plan.schedule, plan.backbone.how),
        Draws(config.seed, "sample"),
        config.classes or tuple(range(conditions.count)),
        min(config.batch_size, config.shard_size) if device.type == "cuda" else 1,
    )
    return maker, origin


class Work:
    """What one process does for the folder."""

    def __init__(self, config: SampleConfig, rank: Rank, folder: ShardFolder, maker: Maker):
        self.config, self.rank, self.folder, self.maker = config, rank, folder, maker
        self.interruption = Interruption()
        self.interruption.standing = self._abandoned
        shards = divide(config.num_samples, config.shard_size)
        self.shards = shards
        # Its own part first; then whatever a slower process, or one that is gone, has left.
        own = shards[rank.number :: rank.world]
        self.order = [
            *own,
            *(shard for shard in shards if shard.number % rank.world != rank.number),
        ]
        # Known to be whole, by content: each process reads its own part, the main one the rest
        # when it puts them together, or before that once it has found one of them damaged.
        self.checked: set[int] = set()
        self.trusts_others = True
        # Known to be there, whoever made them.
        self.seen: set[int] = set()
        self.looked = -math.inf

    def run(self) -> None:
        """Until nothing is missing, or, but for the main process, nothing is left to begin.

        Raises:
            HarmonicaError: the others finish nothing any more.
            Interrupted: a signal came.
        """
        with self.interruption, self._bar() as bar:
            news, since = None, 0.0
            while missing := [shard for shard in self.order if not self._is_done(shard)]:
                busy = [shard for shard in missing if not self._make(shard, bar)]
                self._show(bar)
                if len(busy) < len(missing):
                    continue
                if not self.rank.is_main:
                    return
                known, news = news, (len(missing), self.folder.life())
                if news != known:
                    since = time.monotonic()
                elif time.monotonic() - since > self.config.timeout:
                    raise HarmonicaError(
                        f"no image was made for {self.config.timeout} s: another process does "
                        "not answer; stop it and run the same command again, or raise --timeout"
                    )
                time.sleep(POLL_S)
                self._stop_if_asked()

    def _is_done(self, shard: Shard) -> bool:
        if shard.number in self.checked:
            return True
        reads = shard.number % self.rank.world == self.rank.number or not self.trusts_others
        done = self.folder.is_done(shard, self.config.png, thorough=reads)
        if done and reads:
            self.checked.add(shard.number)
        return done

    def _make(self, shard: Shard, bar: tqdm) -> bool:
        """Make what is missing of a shard; False if another process is at it."""
        with self.folder.claim(shard) as is_mine:
            if not is_mine:
                return False
            self.seen.discard(shard.number)
            if not self.folder.is_done(shard, pictures=False):
                self.folder.write(shard, self.maker(shard.indices, lambda n: self._after(bar, n)))
            if self.config.png and not self.folder.is_done(shard, pictures=True):
                self.folder.write_pictures(shard)
            self.checked.add(shard.number)
            return True

    def _after(self, bar: tqdm, made: int) -> None:
        self.folder.show_life()
        self._show(bar, made)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        signum = self.interruption.signal
        if signum is not None:
            said = f"{self._count()} of {self.config.num_samples} images are in {self.config.out}; "
            said += "run the same command again to go on"
            raise Interrupted(signum, said if self.rank.is_main else "")

    def _abandoned(self) -> str:
        """Where a batch takes longer than the launcher would wait."""
        said = (
            "a batch was under way for too long, so images of its shard are lost; run the same "
            "command again to go on, or with a smaller --shard-size into another folder"
        )
        return said if self.rank.is_main else ""

    # One bar for all processes, which the main one shows.

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.num_samples,
            initial=self._count() if self.rank.is_main else 0,
            desc="samples",
            unit="image",
            bar_format=BAR,
            disable=not self.rank.is_main,
        )

    def _count(self) -> int:
        """Images in shards that are there; it is looked at most once a second."""
        if time.monotonic() - self.looked > 1:
            self.looked = time.monotonic()
            for shard in self.shards:
                if shard.number not in self.seen and self.folder.is_done(
                    shard, pictures=False, thorough=False
                ):
                    self.seen.add(shard.number)
        return sum(len(self.shards[number].indices) for number in self.seen | self.checked)

    def _show(self, bar: tqdm, made: int = 0) -> None:
        if self.rank.is_main:
            bar.update(self._count() + made - bar.n)


def sample_many(config: SampleConfig) -> str | None:
    """Make what is missing of the samples in ``config.out``, and put them together.

    Returns:
        What to print on the main process, None on the others.

    Raises:
        HarmonicaError: bad input, a folder of other images or one in use, or no progress.
        Interrupted: a signal came; the same command goes on.
    """
    if config.ddim_sample:
        config = replace(config, sampler="ddim")
    check_gpus()
    rank = Rank.of_environment()
    with contextlib.ExitStack() as stack:
        if rank.device.type == "cpu":
            stack.enter_context(_one_thread())
        maker, origin = _prepare(config, rank)
        folder = ShardFolder(config.out, origin)
        folder.refuse_foreign()
        if rank.is_main:
            make_folder(config.out)
            stack.enter_context(held(config.out / ".lock", f"--out {config.out}"))
        folder.make()
        work = Work(config, rank, folder, maker)
        work.run()
        if not rank.is_main:
            return None
        try:
            path = folder.assemble(work.shards)
        except DamagedShard:  # of another's part; who made that may be gone, or making it again
            work.trusts_others = False
            work.run()
            path = folder.assemble(work.shards)
    lines = [f"{config.num_samples} images: {path}"]
    if config.png:
        lines.append(f"PNG files: {folder.picture(0).parent}")
    return "\n".join(lines)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are made in an order that depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
