from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_support import check_gradients, check_outputs, load_entry, under
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size
from safetensors.torch import load_file
from torch import Tensor

from mg3d.models.masking import apply_mask
from mg3d.models.vision_encoders import attention_maps, create_vision_encoder, swin, worker_threads
from mg3d.models.vision_encoders.swin import MERGING_OFFSETS, PatchMerging, SwinBlock, SwinEncoder
from mg3d.models.vision_encoders.windows import axis_runs, window_groups

TINY = {"embed_dim": 4, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def tiny(**options: object) -> SwinEncoder:
    torch.manual_seed(3)
    encoder = create_vision_encoder("swin_b", **(TINY | options))
    assert isinstance(encoder, SwinEncoder)
    return encoder


def golden_encoder(golden_dir: Path, name: str, kind: str = "swin_b", **options: object) -> SwinEncoder:
    encoder = create_vision_encoder(kind, **options)
    encoder.load_state_dict(load_file(golden_dir / f"{name}_state.safetensors"), strict=True)
    assert isinstance(encoder, SwinEncoder)
    return encoder.eval()


def strided(full: Tensor, sample: Tensor) -> Tensor:
    """Every k-th voxel so that the result has the shape of ``sample``."""
    d, h, w = (a // b for a, b in zip(full.shape[2:], sample.shape[2:], strict=True))
    return full[:, :, ::d, ::h, ::w]


@pytest.fixture(scope="module")
def cube(golden_dir: Path) -> tuple[SwinEncoder, dict[str, Tensor], dict]:
    tensors, record = load_entry(golden_dir, "swin_b_cube64_io")
    return golden_encoder(golden_dir, "swin_b_cube64", embed_dim=12), tensors, record


def test_cube_outputs_match_the_recorded_encoder(cube: tuple) -> None:
    encoder, tensors, record = cube
    image = tensors["in.image_u8"].float() / 255
    with torch.no_grad():
        maps = encoder.forward_features(image)
        raw = encoder.forward_features(image, normalize=False)
        masked = encoder(apply_mask(image, tensors["mask.cells"][None]))
        tokens = encoder.tokens(image)
    outputs = {f"x{k}": maps[k] for k in range(1, 5)} | {"x0_slice": strided(maps[0], tensors["out.x0_slice"])}
    check_outputs(outputs, under(tensors, "out"), record)
    check_outputs({f"x{k}": raw[k] for k in range(1, 5)}, under(tensors, "raw"), record)
    check_outputs({"x3": masked[3], "x4": masked[4], "t": tokens}, golden_masked(tensors), record)


def golden_masked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x3": tensors["mask.x3"], "x4": tensors["mask.x4"], "t": tensors["tokens"]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cube_gradients_match_the_recorded_encoder(golden_dir: Path, checkpointing: bool) -> None:
    tensors, record = load_entry(golden_dir, "swin_b_cube64_io")
    encoder = golden_encoder(golden_dir, "swin_b_cube64", embed_dim=12, gradient_checkpointing=checkpointing)
    image = (tensors["in.image_u8"].float() / 255).requires_grad_()
    maps = encoder(image)
    ((maps[4] * tensors["cot.x4"]).sum() + (maps[2] * tensors["cot.x2"]).sum()).backward()
    got = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert image.grad is not None
    got["image"] = strided(image.grad, tensors["grad.in.image_slice"])
    wanted = under(tensors, "grad.param") | {"image": tensors["grad.in.image_slice"]}
    check_gradients(got, wanted, record)
    names = record["config"]["grad_l2_names"]
    norms = torch.stack([encoder.get_parameter(name).grad.norm() for name in names])
    torch.testing.assert_close(norms, tensors["grad_l2"], rtol=2e-3, atol=1e-5 * float(tensors["grad_l2"].max()))
    torch.testing.assert_close(image.grad.norm(), tensors["grad.in.image_l2"], rtol=2e-3, atol=0)


def test_real_grid_matches_the_recorded_encoder(golden_dir: Path) -> None:
    tensors, record = load_entry(golden_dir, "swin_grid_128x96x128_io")
    coarse = load_file(golden_dir / "swin_grid_128x96x128_image.safetensors")["in.coarse_u8"].float() / 255
    for axis in (2, 3, 4):
        coarse = coarse.repeat_interleave(4, dim=axis)
    encoder = golden_encoder(golden_dir, "swin_grid_128x96x128", embed_dim=6)
    with torch.no_grad():
        maps = encoder(coarse)
    check_outputs({f"x{k}": maps[k] for k in (2, 3, 4)}, under(tensors, "out"), record)
    for k in (0, 1):
        sample = tensors[f"x{k}_slice"]
        torch.testing.assert_close(strided(maps[k], sample), sample, **record["tolerance"])
    statistics = torch.stack([maps[1].mean(), maps[1].std()])
    torch.testing.assert_close(statistics, tensors["x1_mean_std"], rtol=1e-3, atol=1e-4)
    assert encoder.token_grid((128, 96, 128)) == (4, 3, 4) == tuple(maps[4].shape[2:])


def test_swin_l_layout_and_its_batch_dependent_head(golden_dir: Path) -> None:
    tensors, record = load_entry(golden_dir, "swin_l_layout_io")
    encoder = golden_encoder(golden_dir, "swin_l_layout", "swin_l", embed_dim=6, proj_hidden_dim=48, proj_out_dim=48)
    image = tensors["in.image"]
    with torch.no_grad():
        got = {
            "x4_normalized": encoder(image)[4],
            "tokens": encoder(image)[4].flatten(2).transpose(1, 2),
            "proj": encoder.tokens(image),
            "proj_of_first_sample_alone": encoder.tokens(image[:1]),
        }
    check_outputs(got, {name: tensors[name] for name in got}, record)
    assert not torch.allclose(got["proj"][:1], got["proj_of_first_sample_alone"], atol=1e-2)
    assert encoder.out_channels == 48 and encoder.stage_channels[-1] == 96


def test_relative_position_index_is_the_recorded_one_and_stays_out_of_the_state(golden_dir: Path) -> None:
    encoder = create_vision_encoder("swin_b", embed_dim=6)
    index = load_file(golden_dir / "swin_relative_position_index.safetensors")["index"]
    buffers = [b for name, b in encoder.named_buffers() if name.endswith("relative_position_index")]
    assert len(buffers) == 8
    assert all(torch.equal(buffer, index.long()) for buffer in buffers)
    assert not any("relative_position_index" in name for name in encoder.state_dict())


def test_states_that_carry_the_index_buffers_load_strictly() -> None:
    encoder = tiny()
    state = encoder.state_dict() | {
        "layers1.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.int64)
    }
    holder = torch.nn.ModuleDict({"vision_encoder": encoder})
    encoder.load_state_dict(state, strict=True)
    holder.load_state_dict({f"vision_encoder.{name}": value for name, value in state.items()}, strict=True)


@pytest.mark.parametrize(("name", "millions"), [("swin_b", 8.062002), ("swin_l", 31.593474 + 2.361600)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_vision_encoder(name)
    assert sum(p.numel() for p in encoder.parameters()) == round(millions * 1e6)
    assert encoder.out_channels == 768 and encoder.stride == (32, 32, 32)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("size", [8, 10, 12, 13, 14, 64])
def test_runs_cover_an_axis_once(size: int, shift: int) -> None:
    covered = [
        run.start + k * run.length + p
        for run in axis_runs(size, 7, shift)
        for k in range(run.count)
        for p in range(run.length)
    ]
    assert covered == list(range(size))


def test_window_groups_hold_every_position_once() -> None:
    seen = torch.zeros(1, 9, 6, 11)
    for group in window_groups((9, 6, 11), (4, 6, 4), (2, 0, 2)):
        group.windows(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(seen))


def test_merging_orders_differ_and_fixed_reads_every_voxel_once() -> None:
    assert len(set(MERGING_OFFSETS["fixed"])) == 8
    assert len(set(MERGING_OFFSETS["legacy"])) == 6
    legacy, fixed = tiny(patch_merging="legacy"), tiny(patch_merging="fixed")
    fixed.load_state_dict(legacy.state_dict(), strict=True)
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        one, other = legacy(volume), fixed(volume)
    assert torch.equal(one[0], other[0])
    assert float((one[1] - other[1]).abs().max()) > 0.1


def test_merging_pads_each_axis_by_its_own_remainder() -> None:
    merge = PatchMerging(2, "legacy")
    odd = torch.rand(1, 3, 4, 5, 2)
    padded = torch.zeros(1, 4, 4, 6, 2)
    padded[:, :3, :, :5] = odd
    assert torch.equal(merge(odd), merge(padded))
    assert merge(odd).shape == (1, 2, 2, 3, 4)


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 9, 30), (5, 24, 13), (1, 2, 3)])
def test_any_size_gives_the_promised_token_grid(size: tuple[int, int, int]) -> None:
    encoder = tiny()
    with torch.no_grad():
        maps, tokens = encoder(torch.rand(2, 1, *size)), encoder.tokens(torch.rand(2, 1, *size))
    assert tuple(maps[-1].shape[2:]) == encoder.token_grid(size)
    assert tokens.shape == (2, maps[-1][0, 0].numel(), encoder.out_channels)
    assert [each.shape[1] for each in maps] == list(encoder.stage_channels)


def test_tokens_do_not_depend_on_the_order_or_size_of_the_batch() -> None:
    encoder = tiny()
    volume = torch.rand(3, 1, 16, 8, 20)
    with torch.no_grad():
        together = encoder.tokens(volume)
        reverse = encoder.tokens(volume.flip(0)).flip(0)
        alone = torch.cat([encoder.tokens(each[None]) for each in volume])
    torch.testing.assert_close(together, reverse)
    torch.testing.assert_close(together, alone)


def test_checkpointing_reaches_all_parameters_from_an_input_without_gradient() -> None:
    plain, saving = tiny().train(), tiny(gradient_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    volume = torch.rand(2, 1, 16, 16, 16)
    for encoder in (plain, saving):
        encoder.tokens(volume).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def padded_mask(block: SwinTransformerBlock, grid: tuple[int, int, int]) -> Tensor:
    window, shift = get_window_size(grid, block.window_size, block.shift_size)
    padded = [-(-size // edge) * edge for size, edge in zip(grid, window, strict=True)]
    return compute_mask(padded, window, shift, torch.device("cpu"))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layer by layer"])
@pytest.mark.parametrize("budget", [1, 10**4, 10**9])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 1)])
@pytest.mark.parametrize("grid", [(6, 8, 9), (7, 5, 4), (3, 9, 2), (3, 4, 3)])
def test_a_block_equals_monais_with_all_gradients(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int], shift: tuple[int, int, int], budget: int, fused: bool
) -> None:
    monkeypatch.setattr(attention_maps, "CPU_MAP_BYTES", budget)
    monkeypatch.setattr(worker_threads, "PORTION_BYTES", budget)
    if not fused:  # as on a GPU, in half precision and with stochastic depth
        monkeypatch.setattr(swin, "can_fuse_attention", lambda *_: False)
    torch.manual_seed(0)
    ours = SwinBlock(12, 3, (3, 4, 3), shift)
    theirs = SwinTransformerBlock(12, 3, (3, 4, 3), shift, qkv_bias=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours, theirs = ours.double(), theirs.double()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for block, mask in ((ours, None), (theirs, padded_mask(theirs, grid))):
        hidden = (
            torch.linspace(-2, 2, 2 * 12 * grid[0] * grid[1] * grid[2])
            .double()
            .sin()
            .view(2, *grid, 12)
            .requires_grad_()
        )
        out = block(hidden, mask)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, hidden.grad, *(parameter.grad for parameter in block.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_stochastic_depth_drops_whole_halves_in_training_only() -> None:
    torch.manual_seed(0)
    block = SwinBlock(12, 3, (3, 4, 3), (0, 0, 0), drop_path=0.9999).train()
    hidden = torch.rand(2, 3, 4, 3, 12)
    torch.testing.assert_close(block(hidden, None), hidden)
    assert not torch.allclose(block.eval()(hidden, None), hidden)


def test_threads_share_the_windows_without_changing_the_result() -> None:
    torch.manual_seed(0)
    block = SwinBlock(12, 3, (3, 4, 3), (1, 2, 1)).double()
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        hidden = torch.linspace(-2, 2, 2 * 12 * 9 * 8 * 7).double().sin().view(2, 9, 8, 7, 12).requires_grad_()
        block.zero_grad()
        block(hidden, None).square().sum().backward()
        results.append([hidden.grad, *(parameter.grad.clone() for parameter in block.parameters())])
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_without_gradients_too(mode: type) -> None:
    encoder, volume, threads = tiny(), torch.rand(2, 1, 16, 16, 16), torch.get_num_threads()
    torch.set_num_threads(2)
    with mode():
        quiet = encoder.tokens(volume)
    torch.set_num_threads(threads)
    torch.testing.assert_close(quiet, encoder.tokens(volume).detach())


def test_bfloat16_autocast_stays_close_and_trains() -> None:
    encoder = tiny(proj_out_dim=8, proj_hidden_dim=8)
    volume = torch.rand(2, 1, 16, 16, 16)
    exact = encoder.tokens(volume)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder.tokens(volume)
        rough.float().square().sum().backward()
    assert float((rough.float() - exact).detach().abs().max()) < 0.1 * float(exact.detach().abs().max())
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_metadata_rebuilds_the_encoder() -> None:
    first = tiny(patch_merging="fixed", window_size=(4, 2, 4), patch_size=(2, 2, 4))
    kept = first.metadata()
    keys = ("embed_dim", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio", "patch_merging")
    again = create_vision_encoder(kept["name"], **{key: kept[key] for key in keys})
    again.load_state_dict(first.state_dict(), strict=True)
    assert again.metadata() == kept and again.stride == (8, 8, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"patch_merging": "new"},
        {"embed_dim": 5},
        {"depths": (2, 2, 2)},
        {"window_size": (7, 7)},
        {"patch_size": 0},
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"patch_merging|heads|num_heads|window_size|patch_size"):
        tiny(**options)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        tiny()(torch.rand(1, 16, 16, 16))
    with pytest.raises(TypeError, match="uint8"):
        tiny()(torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8))
