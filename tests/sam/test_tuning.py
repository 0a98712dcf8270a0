"""The encoder run otherwise: other forms of attention, a narrow residual stream, compiled."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import partial

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from teachers import make_card
from torch import Tensor, nn

from pipeline.config import PrecomputeConfig
from pipeline.errors import ConfigError
from pipeline.sam.attention import FoldedAttention
from pipeline.sam.build import build_sam
from pipeline.sam.global_attention import FORMS, Attend, attend_flexibly
from pipeline.sam.teacher import Teacher
from pipeline.sam.tuning import COMPILE_OPTIONS, MOST_SHAPES, BFloat16Norm, CompiledEncoder, tune

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
#: torch cannot trace bytecode that counts what it covers; `make test` runs these by themselves.
traced = pytest.mark.skipif("slipcover" in sys.modules, reason="torch cannot trace slipcover")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """vit_t's, with random weights, relative positions too."""
    torch.manual_seed(0)
    found = build_sam("vit_t").image_encoder.eval().requires_grad_(False)
    for name, parameter in found.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.2)
    return found


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------- attention


@torch.no_grad()
@pytest.mark.parametrize(
    "attend",
    [FORMS["bias"], pytest.param(partial(attend_flexibly, compiled=False), marks=traced)],
    ids=["bias", "flex"],
)
def test_every_form_is_segment_anythings(attend: Attend) -> None:
    torch.manual_seed(0)
    stock = Attention(64, num_heads=2, use_rel_pos=True, input_size=(6, 9))
    for table in (stock.rel_pos_h, stock.rel_pos_w):
        nn.init.normal_(table)
    x = torch.randn(2, 6, 9, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex is slow without a compiler, which is no matter here
        found = FoldedAttention(stock, attend=attend)(x)
    assert relative_error(found, stock(x)) < 1e-5


@torch.no_grad()
def test_only_global_blocks_attend_otherwise(encoder: nn.Module, pixels: Tensor) -> None:
    tuned = tune(copy.deepcopy(encoder), PrecomputeConfig(attention="bias"), CPU)
    forms = [block.attn.attend for block in tuned.blocks]  # type: ignore[union-attr]
    assert [form is not None for form in forms] == [False, False, True, False, False, True]
    assert relative_error(tuned(pixels), encoder(pixels)) < 1e-4


@pytest.mark.parametrize(
    ("run", "asked"),
    [
        (PrecomputeConfig(attention="flex"), "attention: flex"),
        (PrecomputeConfig(residual="bf16"), "residual: bf16"),
    ],
)
def test_other_encoders_have_no_such_blocks(run: PrecomputeConfig, asked: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(nn.Conv2d(3, 3, 1), run, CPU)
    assert str(caught.value).startswith(f"precompute.{asked} is for the encoders of vit_t, vit_b,")


@pytest.mark.gpu
@needs_cuda
@torch.inference_mode()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_on_a_gpu(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = Attention(768, num_heads=12, use_rel_pos=True, input_size=(64, 64)).cuda()
    for table in (stock.rel_pos_h, stock.rel_pos_w):
        nn.init.normal_(table, std=0.2)
    x = torch.randn(1, 64, 64, 768, device="cuda")
    expected = stock(x)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = FoldedAttention(stock, attend=FORMS[form])(x)
    assert relative_error(found, expected) < (1e-3 if dtype == torch.float32 else 2e-2)


# --------------------------------------------------------------------------- residual


@torch.no_grad()
def test_a_narrow_residual_stream(encoder: nn.Module, pixels: Tensor) -> None:
    """Blocks add to bfloat16 then; the error stays in the order of bfloat16's own."""
    tuned = tune(copy.deepcopy(encoder), PrecomputeConfig(residual="bf16"), CPU)
    streams: dict[nn.Module, set[torch.dtype]] = {tuned: set(), encoder: set()}
    for model, seen in streams.items():
        for block in model.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(lambda _, args, out, seen=seen: seen.add(out.dtype))
    exact = encoder(pixels)
    streams[encoder].clear()
    with torch.autocast("cpu", torch.bfloat16):
        plain, narrow = encoder(pixels), tuned(pixels)
    assert streams == {tuned: {torch.bfloat16}, encoder: {torch.float32}}
    assert relative_error(narrow, exact) < 2.5 * relative_error(plain, exact) < 0.05


def test_a_norm_that_autocast_leaves_alone() -> None:
    norm = nn.LayerNorm(8)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = BFloat16Norm(copy.deepcopy(norm))(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), norm(x.float()), atol=0.02)


# --------------------------------------------------------------------------- compiled


class Doubling(nn.Module):
    """An encoder in small, with memory for so many images."""

    img_size = 4

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.batches = capacity, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        if len(x) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x


def test_batches_have_one_size() -> None:
    inner = Doubling(capacity=8)
    compiled = CompiledEncoder(inner, 4, compiler=lambda encoder: encoder)
    for count in (4, 3, 1, 9):
        x = torch.randn(count, 3, 4, 4)
        assert torch.equal(compiled(x), 2 * x)
    assert inner.batches == [4] * 6
    assert compiled.img_size == 4


def test_the_size_follows_when_memory_runs_out() -> None:
    """Padded to the old one, half as many images would need as much memory again."""
    inner = Doubling(capacity=2)
    compiled = CompiledEncoder(inner, 7, compiler=lambda encoder: encoder)
    for count in (7, 4):
        with pytest.raises(torch.OutOfMemoryError):
            compiled(torch.randn(count, 3, 4, 4))
    assert torch.equal(compiled(torch.ones(2, 3, 4, 4)), torch.full((2, 3, 4, 4), 2.0))
    assert inner.batches == [7, 4, 2]


def test_more_shapes_than_torch_compiles_are_one_line() -> None:
    """As content frames have them; those that were there before stay."""
    compiled = CompiledEncoder(Doubling(capacity=4), 4, compiler=lambda encoder: encoder)
    for width in range(1, MOST_SHAPES + 1):
        compiled(torch.randn(3, 3, 4, width))
    compiled(torch.randn(9, 3, 4, 1))
    with pytest.raises(ConfigError, match=r"compile: found batches of more than 8 shapes"):
        compiled(torch.randn(3, 3, 5, 1))


def test_compiling_needs_a_gpu(encoder: nn.Module) -> None:
    with pytest.raises(ConfigError, match="compile: true needs a CUDA device; set it to false"):
        tune(encoder, PrecomputeConfig(compile=True), CPU)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
def test_the_compilers_options_are_its_own() -> None:
    """torch refuses a name that it does not know at once, and compiles nothing yet."""
    torch.compile(nn.Identity(), options=COMPILE_OPTIONS)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(nn.Identity(), options={"deterministically": True})


@torch.no_grad()
@traced
def test_the_encoder_is_one_graph(encoder: nn.Module, pixels: Tensor) -> None:
    """Nothing in it breaks torch.compile's graph, in autocast as stage one runs it.

    Takes seconds: tracing is what it is about.
    """
    tuned = tune(copy.deepcopy(encoder), PrecomputeConfig(residual="bf16", attention="flex"), CPU)
    traced = torch.compile(tuned, backend="eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(traced(pixels), encoder(pixels).float()) < 0.05


def test_a_narrow_stream_is_for_bfloat16() -> None:
    teacher = Teacher(
        build_sam("vit_t"), make_card(variant="vit_t"), device="cpu", precision="fp32"
    )
    with pytest.raises(ConfigError) as caught:
        teacher.tune(PrecomputeConfig(residual="bf16"))
    assert str(caught.value) == (
        "precompute.residual: bf16 asked for, but the encoder computes in fp32; set "
        "precompute.precision to bf16, or precompute.residual to fp32"
    )


def test_what_is_tuned_is_recorded() -> None:
    run = PrecomputeConfig(attention="bias", precision="fp32", device="cpu")
    sam, card = build_sam("vit_t"), make_card(variant="vit_t", input_size=256)
    plain = Teacher(sam, card, device="cpu", precision="fp32")
    before = plain.provenance()
    assert plain.tune(PrecomputeConfig()).provenance() == before
    assert plain.tune(run).provenance() == before | {"attention": "bias"}


@pytest.mark.gpu
@needs_cuda
@torch.inference_mode()
@pytest.mark.parametrize("attention", ["auto", "bias", "flex"])
def test_compiled_on_a_gpu(encoder: nn.Module, pixels: Tensor, attention: str) -> None:
    """The same bytes again, from another compilation too: no stopwatch chooses kernels."""
    run = PrecomputeConfig(compile=True, attention=attention, batch_size=4)  # type: ignore[arg-type]
    images, found = pixels.cuda(), []
    exact = copy.deepcopy(encoder).cuda()(images)
    for _ in range(2):
        torch.compiler.reset()
        tuned = tune(copy.deepcopy(encoder).cuda(), run, torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            found.append(tuned(images))
    assert relative_error(found[0], exact) < 0.05
    assert torch.equal(*found)
