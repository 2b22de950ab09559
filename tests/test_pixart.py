"""PixArt against diffusers, in every published variant, and the names of both kinds of files."""

import pytest
import torch
from conftest import relative
from families import PIXART, randomised

from models.pixart import PixArt, PixArtConfig, from_diffusers, weights_of
from models.prompts import Prompts

# sample size, interpolation, micro-conditions: alpha at 256, 512, 1024; Sigma at 256, 1024, 2048,
# which at 512 is like alpha.
VARIANTS = [
    (8, 1.0, False),
    (16, 1.0, False),
    (16, 2.0, True),
    (8, 0.5, False),
    (16, 2.0, False),
    (16, 4.0, False),
]
TOKENS, CHANNELS = 7, 20


def pair(sample_size: int, interpolation: float, micro: bool):
    """diffusers' model with random weights, and ours with the same."""
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, num_layers=2, cross_attention_dim=48,
        caption_channels=CHANNELS, sample_size=sample_size, interpolation_scale=interpolation,
        use_additional_conditions=micro,
    )  # fmt: skip
    ours = PixArt(
        PixArtConfig(
            48, 2, 3, input_size=sample_size, caption_channels=CHANNELS, max_tokens=TOKENS,
            interpolation=interpolation, has_micro_conditions=micro,
        )
    )  # fmt: skip
    randomised(theirs)
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    return theirs, ours.requires_grad_(False).eval()


@pytest.mark.parametrize(("sample_size", "interpolation", "micro"), VARIANTS)
@pytest.mark.parametrize("shape", [None, (8, 12), (6, 4)])
def test_a_forward_equals_that_of_diffusers(sample_size, interpolation, micro, shape):
    theirs, ours = pair(sample_size, interpolation, micro)
    torch.manual_seed(0)
    x = torch.randn(3, 4, *(shape or (sample_size, sample_size)))
    embeddings = torch.randn(3, TOKENS, CHANNELS)
    mask = torch.arange(TOKENS) < torch.tensor([[1], [4], [7]])
    t = torch.tensor([3, 500, 999])
    size = torch.tensor([[1024.0, 768.0], [512.0, 512.0], [256.0, 1024.0]])
    told = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    expected = theirs(
        x, embeddings, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=told
    ).sample
    y = Prompts(embeddings, mask, embeddings[:1], mask[:1], size)
    assert relative(ours(x, t, y), expected) < 1e-5


def test_what_is_masked_out_changes_nothing_and_the_rest_does():
    _, ours = pair(8, 1.0, False)
    x, embeddings = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS, CHANNELS)
    mask = torch.arange(TOKENS) < torch.tensor([[3], [5]])
    size, t = torch.ones(2, 2), torch.tensor([10.0, 700.0])

    def out(embeddings):
        return ours(x, t, Prompts(embeddings, mask, embeddings[:1], mask[:1], size))

    changed = torch.where(mask[..., None], embeddings, 5.0)
    assert torch.equal(out(changed), out(embeddings))
    assert not torch.allclose(out(embeddings + 0.1), out(embeddings))


def test_original_checkpoints_load_strictly():
    """Names of the published .pth files, of which positions and null caption are no weights."""
    block = [
        "scale_shift_table", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
        "attn.proj.bias", "cross_attn.q_linear.weight", "cross_attn.q_linear.bias",
        "cross_attn.kv_linear.weight", "cross_attn.kv_linear.bias", "cross_attn.proj.weight",
        "cross_attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    linear = [
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1",
        "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear",
        "csize_embedder.mlp.0", "csize_embedder.mlp.2", "ar_embedder.mlp.0", "ar_embedder.mlp.2",
    ]  # fmt: skip
    names = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    names |= {f"blocks.{i}.{name}" for i in range(PIXART.depth) for name in block}
    names |= {"final_layer.scale_shift_table"}
    _, ours = pair(8, 1.0, True)
    state = ours.state_dict()
    assert set(state) == names
    state |= {"pos_embed": torch.zeros(1, 16, 48), "y_embedder.y_embedding": torch.zeros(7, 20)}
    assert weights_of(state, 7).keys() == names
    # alpha and Sigma differ in nothing else.
    assert weights_of(state, 12).keys() - names == {"y_embedder.y_embedding"}


def test_xl_has_as_many_weights_as_published():
    with torch.device("meta"):
        model = PixArt(PixArtConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 610_856_096


def test_prompts_act_like_labels():
    tokens, mask = torch.randn(4, TOKENS, CHANNELS), torch.rand(4, TOKENS) < 0.5
    y = Prompts(tokens[:3], mask[:3], tokens[3:], mask[3:], torch.ones(3, 2))
    picked = y[torch.tensor([2, 0])]
    assert len(picked) == 2 and torch.equal(picked.embeddings, tokens[[2, 0]])
    both = y.with_null()
    assert len(both) == 6 and torch.equal(both.embeddings[:3], tokens[:3])
    assert torch.equal(both.embeddings[3:], tokens[3:].expand(3, -1, -1))
    assert torch.equal(both.mask[3:], mask[3:].expand(3, -1))
    copy = y.clone()
    copy.copy_(y[torch.tensor([1, 1, 1])])
    assert torch.equal(copy.mask, mask[[1, 1, 1]]) and torch.equal(y.mask, mask[:3])
