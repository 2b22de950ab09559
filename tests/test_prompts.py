"""Prompts: encoding against the library's own call, and the file that keeps the result."""

import gc
import json
import re
import runpy
import shutil
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, relative
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import read_safetensors
from harmonica.prompts import (
    BUNDLED_PROMPTS,
    EncodedPrompts,
    load_prompts,
    read_prompts,
    save_prompts,
    warn_of_cut,
)
from harmonica.text_encoder import (
    Reading,
    TextEncoder,
    encode_once,
    encode_prompts,
    kept_file,
)
from models import MODELS

CPU = torch.device("cpu")
NORM = "encoder.final_layer_norm.weight"
TEXTS = ("A cat on a mat", "", "eine Brücke über den Fluß, 夜 🌉", "fog")


def encoded(folder, texts=TEXTS, length=40, lowercases=True, **options) -> EncodedPrompts:
    return encode_prompts(texts, Reading(str(folder), length, lowercases), CPU, **options)


def same(a: EncodedPrompts, b: EncodedPrompts) -> bool:
    tensors = ("tokens", "mask", "null_tokens", "null_mask")
    others = ("texts", "encoder", "lowercased", "num_cut")
    return all(getattr(a, name) == getattr(b, name) for name in others) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )


@pytest.mark.parametrize("model", ["PixArt-alpha-XL/2", "PixArt-Sigma-XL/2"])
def test_embeddings_are_those_of_the_encoder_at_full_length(model, tiny_t5):
    """As PixArt calls it: padded to the limit, with the tokenizer's mask; alpha in lower case."""
    lowercases = Reading.of(MODELS[model], "").lowercases
    assert lowercases == (model == "PixArt-alpha-XL/2")
    prompts = encoded(tiny_t5, lowercases=lowercases, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5, subfolder="tokenizer")
    model = T5EncoderModel.from_pretrained(tiny_t5, subfolder="text_encoder").eval()
    assert prompts.texts == TEXTS
    embeddings = prompts.embeddings([0, 1, 2, 3])
    assert prompts.lowercased == lowercases
    assert embeddings.shape == (4, 40, 16) and embeddings.dtype == torch.float16
    assert torch.equal(prompts.embeddings([2, 0, 2]), embeddings[[2, 0, 2]])
    for i, text in enumerate(TEXTS):
        tokens = tokenizer(
            text.lower() if lowercases else text,
            padding="max_length", max_length=40, truncation=True, return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask[0].bool()
        with torch.inference_mode():
            expected = model(**tokens).last_hidden_state[0]
        assert torch.equal(prompts.mask[i], mask)
        assert relative(embeddings[i][mask], expected[mask]) < 1e-3  # half precision
        assert not embeddings[i][~mask].any()


def test_the_empty_prompt_is_the_null_prompt(tiny_t5):
    prompts = encoded(tiny_t5)
    assert prompts.null_mask.sum() == 1  # the end of the text
    assert torch.equal(prompts.mask[1], prompts.null_mask)
    assert relative(prompts.embeddings([1])[0], prompts.null_embedding) < 1e-3


def test_long_prompts_are_cut_with_a_warning(tiny_t5, tmp_path):
    """As often as they are used, not only when they are encoded."""
    prompts = encoded(tiny_t5, ("fog", "long " * 20))
    assert prompts.mask[1].all() and prompts.num_cut == 1
    save_prompts(tmp_path / "prompts.safetensors", prompts)
    found = load_prompts(tmp_path / "prompts.safetensors")
    with pytest.warns(HarmonicaWarning, match="1 of 2 prompts are longer than 40 tokens"):
        warn_of_cut(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cut(encoded(tiny_t5))


def test_the_encoder_is_gone_afterwards(tiny_t5, monkeypatch):
    seen, load = [], TextEncoder._load

    def watched(*arguments, **options):
        loaded = load(*arguments, **options)
        seen.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(TextEncoder, "_load", watched)
    encoded(tiny_t5)
    gc.collect()
    assert len(seen) == 2 and all(reference() is None for reference in seen)


def test_a_t5_without_a_pipeline_around_it_works(tiny_t5, tmp_path):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_t5 / part, tmp_path, dirs_exist_ok=True)
    assert torch.equal(encoded(tmp_path).tokens, encoded(tiny_t5).tokens)


def test_finished_batches_are_not_encoded_again(tiny_t5, tmp_path, monkeypatch):
    parts, whole = tmp_path / "parts", encoded(tiny_t5, batch_size=1)
    encode, sizes = TextEncoder.encode, []

    def interrupted(self, ids, device):
        if len(sizes) == 3:  # the null prompt and two batches
            raise KeyboardInterrupt
        sizes.append(len(ids))
        return encode(self, ids, device)

    monkeypatch.setattr(TextEncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded(tiny_t5, batch_size=1, parts=parts)
    sizes.clear()
    assert same(encoded(tiny_t5, batch_size=1, parts=parts), whole)
    assert len(sizes) == 3  # the null prompt again, and the other two
    sizes.clear()
    assert same(encoded(tiny_t5, batch_size=1, parts=parts), whole) and not sizes
    # Other texts are encoded, whatever the folder holds.
    with pytest.raises(KeyboardInterrupt):
        encoded(tiny_t5, ("a", "b", "c", "d"), batch_size=1, parts=parts)


def test_a_damaged_batch_is_encoded_again(tiny_t5, tmp_path):
    whole = encoded(tiny_t5, batch_size=2, parts=tmp_path)
    part = tmp_path / "000001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert same(encoded(tiny_t5, batch_size=2, parts=tmp_path), whole)
    assert load_prompts(part).texts == TEXTS[2:]


def test_a_file_gives_back_what_was_saved(tiny_t5, tmp_path):
    prompts = encoded(tiny_t5)
    save_prompts(tmp_path / "prompts.safetensors", prompts)
    assert same(load_prompts(tmp_path / "prompts.safetensors"), prompts)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda t, m: m.update(format="other"), "its format"),
        (lambda t, m: m.update(texts="[1]"), "its texts"),
        (lambda t, m: m.update(texts='["one"]'), "1 texts do not go"),
        (lambda t, m: m.update(lowercased="perhaps"), "lower case"),
        (lambda t, m: m.update(cut="3"), "number of prompts that were cut"),
        (lambda t, m: t.pop("null_mask"), "missing or unknown"),
        (lambda t, m: t.update(mask=t["mask"].int()), "not boolean"),
        (lambda t, m: t["mask"][0].zero_(), "no token"),
        (lambda t, m: t.update(tokens=t["tokens"][1:]), "tokens is"),
        (lambda t, m: t["tokens"].fill_(torch.nan), "not finite"),
        (lambda t, m: t.update(null_tokens=t["null_tokens"][:, 1:]), "another width"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tiny_t5, tmp_path, spoil, reason):
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, encoded(tiny_t5, ("fog", "a cat")))
    tensors, metadata = read_safetensors(path)
    spoil(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    with pytest.raises(HarmonicaError, match=reason) as refused:
        load_prompts(path)
    assert "--prompts" in str(refused.value) and "encode_prompts.py" in str(refused.value)


def test_what_is_not_there_is_refused(tmp_path, tiny_t5):
    with pytest.raises(HarmonicaError, match=r"--prompts .*absent"):
        load_prompts(tmp_path / "absent")
    with pytest.raises(HarmonicaError, match="--text-encoder") as refused:
        encoded(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(HarmonicaError, match="holds no prompt"):
        encoded(tiny_t5, ())


def test_a_tokenizer_of_another_encoder_is_refused(tiny_t5, tmp_path):
    shutil.copytree(tiny_t5 / "tokenizer", tmp_path / "tokenizer")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    small = T5EncoderModel(T5Config(vocab_size=10, **sizes))
    small.save_pretrained(tmp_path / "text_encoder")
    said = "--text-encoder .* has a tokenizer of 30 tokens and an encoder of 10"
    with pytest.raises(HarmonicaError, match=said):
        encoded(tmp_path)


def test_files_of_when_all_prompts_were_lower_cased_say_so(tiny_t5, tmp_path):
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, encoded(tiny_t5, lowercases=False))
    assert not load_prompts(path).lowercased
    tensors, metadata = read_safetensors(path)
    del metadata["lowercased"]
    save_file(tensors, path, metadata)
    assert load_prompts(path).lowercased


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda weights, config: weights.pop(NORM), f"{NORM} is missing"),
        (lambda weights, config: weights.pop("shared.weight"), r"embed_tokens\.weight is missing"),
        (lambda weights, config: weights.update({NORM: torch.ones(3)}), "mismatch"),
        (lambda weights, config: config.update(d_model="x"), "d_model"),
        (lambda weights, config: config.update(d_ff=-1), "negative dimension"),
        (lambda weights, config: config.update(dtype="x"), "no attribute"),
    ],
)
def test_an_encoder_that_is_not_whole_is_refused(tiny_t5, tmp_path, spoil, reason):
    """What is missing would be random numbers."""
    folder = shutil.copytree(tiny_t5, tmp_path / "t5") / "text_encoder"
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    spoil(weights, config)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HarmonicaError, match=f"no text_encoder that can be loaded .*{reason}"):
        encoded(tmp_path / "t5")


def test_the_encoder_of_a_whole_t5_is_taken(tiny_t5, tmp_path):
    """With a decoder beside it in the file."""
    from transformers import T5ForConditionalGeneration

    shutil.copytree(tiny_t5 / "tokenizer", tmp_path / "tokenizer")
    config = T5Config.from_pretrained(tiny_t5 / "text_encoder")
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "text_encoder")
    encoder = load_file(tiny_t5 / "text_encoder" / "model.safetensors")
    path = tmp_path / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), **encoder, "more": torch.ones(1)}, path, {"format": "pt"})
    assert torch.equal(encoded(tmp_path).tokens, encoded(tiny_t5).tokens)


def test_numbers_beyond_half_precision_are_refused(tiny_t5, tmp_path):
    shutil.copytree(tiny_t5 / "tokenizer", tmp_path / "tokenizer")
    model = T5EncoderModel.from_pretrained(tiny_t5, subfolder="text_encoder")
    model.encoder.final_layer_norm.weight.data.fill_(1e6)
    model.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(HarmonicaError, match="not finite"):
        encoded(tmp_path)


def test_prompt_files_have_a_prompt_on_every_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("夜の橋\nfog, 5 a.m.\n", "utf-8")
    assert read_prompts(path) == ["夜の橋", "fog, 5 a.m."]
    # Only what every editor shows as the end of a line is one; an empty one is the empty prompt.
    path.write_bytes("a\u2028b\x85c\x0bd\x1ce\r\n\r\nfog\n\n \n".encode())
    assert read_prompts(path) == ["a\u2028b\x85c\x0bd\x1ce", "", "fog"]
    # Some editors open a file with a mark of its byte order, which is no part of the first prompt.
    path.write_text("fog\n\ufeffa cat\n", "utf-8-sig")
    assert read_prompts(path) == ["fog", "\ufeffa cat"]
    for nothing in ("", "\n \n"):
        path.write_text(nothing)
        with pytest.raises(HarmonicaError, match="is empty"):
            read_prompts(path)


def test_prompts_are_encoded_once(tiny_t5, tmp_path, monkeypatch):
    """Whoever asks next finds the file, unless the question or the encoder is another."""
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path / "cache")
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    reading = Reading(str(folder), 40, lowercases=True)
    arguments = (TEXTS, reading, CPU)
    first = encode_once(*arguments)
    assert same(first, encoded(folder))
    left = [path.name for path in (tmp_path / "cache" / "prompts").iterdir()]
    path = kept_file(TEXTS, reading)
    assert sorted(left) == sorted([path.name, f".{path.name}.lock"])
    others = [
        kept_file(TEXTS[:3], reading),
        kept_file(TEXTS, replace(reading, max_tokens=41)),
        kept_file(TEXTS, replace(reading, encoder=str(tiny_t5))),
        kept_file(TEXTS, replace(reading, lowercases=False)),
    ]
    assert len({path, *others}) == 5
    with monkeypatch.context() as without:
        without.setattr("harmonica.text_encoder.TextEncoder", None)
        assert same(encode_once(*arguments), first)
    path.write_bytes(path.read_bytes()[:-1])  # damaged: encoded again
    assert same(encode_once(*arguments), first)
    (folder / "text_encoder" / "config.json").touch()
    assert not kept_file(TEXTS, reading).exists()
    with pytest.raises(HarmonicaError, match="HARMONICA_CACHE"):
        monkeypatch.setattr("harmonica.downloads.CACHE", path)
        encode_once(*arguments)


def test_one_encodes_while_others_wait(tiny_t5, tmp_path, monkeypatch):
    """Threads exclude each other like processes: each opens the lock for itself."""
    monkeypatch.setattr("harmonica.downloads.CACHE", tmp_path)
    encode, calls, both = TextEncoder.encode, [], threading.Barrier(2)
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, *rest: calls.append(rest) or encode(self, *rest)
    )

    def start() -> EncodedPrompts:
        both.wait(10)
        return encode_once(TEXTS, Reading(str(tiny_t5), 40), CPU)

    with ThreadPoolExecutor(2) as pool:
        a, b = [future.result(60) for future in [pool.submit(start), pool.submit(start)]]
    assert same(a, b) and len(calls) == 2  # the null prompt, and the batch


def test_what_is_held_does_not_grow_with_the_length(tiny_t5):
    few, many = encoded(tiny_t5, length=40), encoded(tiny_t5, length=120)
    assert many.tokens.shape == few.tokens.shape == (int(few.mask.sum()), 16)
    assert not any(tensor.dim() > 2 for tensor in vars(many).values() if torch.is_tensor(tensor))


def test_the_script_encodes_a_text_file_once(tiny_t5, tmp_path, monkeypatch, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(("fog", "夜の橋", "a cat " * 20)), "utf-8")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        command = [
            "encode_prompts.py", "--prompts", "captions.txt", "--out", "out.safetensors",
            "--text-encoder", str(tiny_t5), "--max-tokens", "40", *arguments,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(ROOT / "scripts" / "encode_prompts.py"), run_name="__main__")

    run("--batch-size", "2")
    printed = capsys.readouterr()
    assert "warning: 1 of 3 prompts are longer than 40 tokens and were cut\n" in printed.err
    assert "out.safetensors: 3 prompts" in printed.out and "prompts: 100%" in printed.err
    prompts = load_prompts(tmp_path / "out.safetensors")
    assert prompts.texts[:2] == ("fog", "夜の橋") and prompts.encoder == str(tiny_t5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt", "out.safetensors"]
    monkeypatch.setattr(TextEncoder, "encode", None)
    run()  # nothing is left to do
    with pytest.raises(SystemExit) as ended:
        run("--max-tokens", "30")
    assert ended.value.code == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: --out out.safetensors holds something else")
    with pytest.raises(SystemExit):
        run("--model", "DiT-XL/2")
    assert capsys.readouterr().err == (
        "error: --model DiT-XL/2 reads no prompts; use PixArt-alpha-XL/2 or PixArt-Sigma-XL/2\n"
    )


def test_the_bundled_prompts_are_many_and_varied():
    prompts = read_prompts(BUNDLED_PROMPTS)
    assert len(prompts) >= 1000
    words = [tuple(re.findall(r"[\w'-]+", prompt.lower())) for prompt in prompts]
    assert len(set(words)) == len({frozenset(some) for some in words}) == len(prompts)
    lengths = [len(some) for some in words]
    assert min(lengths) >= 1 and 20 <= max(lengths) <= 40
    assert sum(length <= 3 for length in lengths) > 40
    assert sum(length >= 15 for length in lengths) > 50
    assert len({word for some in words for word in some}) > 1500
    # Nothing that surprises a tokenizer or a reader.
    assert all(prompt == " ".join(prompt.split()) for prompt in prompts)
    articles = re.compile(r"\b(a [aeio]|an [b-df-gj-np-tv-z])", re.IGNORECASE)
    assert not [prompt for prompt in prompts if articles.search(prompt)]
