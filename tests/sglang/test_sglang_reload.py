"""Loading layer by layer, weights that are replaced while the model runs, and checkpoints that cannot be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, save, tiny_model
from safetensors.torch import load_file, save_file
from sglang_engine import logprobs, modules, runner

pytestmark = pytest.mark.sglang

CASES = [("llama", "bf16"), ("llama", "compressed_tensors"), ("qwen3_moe", "bf16"), ("qwen3_moe", "modelopt")]


def runs_with(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{parameter}": tensor
        for name, layer in modules(model).items()
        if hasattr(layer, "nvfp4_weights")
        for parameter, tensor in layer.named_parameters(recurse=False)
    }


def folder(path: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(path / "model.safetensors").items())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory):
    """(kind, form) -> a checkpoint of other weights than `checkpoint`'s."""
    root = tmp_path_factory.mktemp("other")
    return lambda kind, form: save(tiny_model(kind, seed=1), form, root / f"{kind}_{form}")


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_new_weights_from_disk_in_place(kind: str, form: str, checkpoint, other) -> None:
    with runner(other(kind, form), {"activation": "none"}) as model:
        expected = logprobs(model, PROMPT)
    with runner(checkpoint(kind, form), {"activation": "none"}) as model:
        before, addresses = logprobs(model, PROMPT), {name: t.data_ptr() for name, t in runs_with(model).items()}
        done, message = model.weight_updater.update_weights_from_disk(str(other(kind, form)), "auto")
        assert done, message
        assert torch.equal(logprobs(model, PROMPT), expected)
        assert not torch.equal(before, expected)
        assert {name: t.data_ptr() for name, t in runs_with(model).items()} == addresses


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_an_update_session_takes_any_order_and_serves_the_old_weights_until_a_layer_is_whole(
    kind: str, form: str, checkpoint, other
) -> None:
    with runner(other(kind, form), {"activation": "none"}) as model:
        expected = logprobs(model, PROMPT)
    with runner(checkpoint(kind, form), {"activation": "none"}) as model:
        old = logprobs(model, PROMPT)
        updater = model.weight_updater
        updater.begin_weight_update()
        assert torch.equal(logprobs(model, PROMPT), old)
        tensors = folder(other(kind, form))
        order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0)).tolist()
        for i in order:
            model.model.load_weights([tensors[i]])
        updater.end_weight_update(run_post_load=False)
        assert torch.equal(logprobs(model, PROMPT), expected)


def test_a_session_without_weights_changes_nothing(checkpoint) -> None:
    with runner(checkpoint("qwen3_moe", "modelopt"), {"activation": "none"}) as model:
        old = logprobs(model, PROMPT)
        model.weight_updater.begin_weight_update()
        model.weight_updater.end_weight_update(run_post_load=False)
        assert torch.equal(logprobs(model, PROMPT), old)


def test_part_of_a_layer_is_an_error_and_a_new_session_mends_it(checkpoint, other) -> None:
    with runner(checkpoint("llama", "bf16"), {"activation": "none"}) as model:
        old = logprobs(model, PROMPT)
        tensors = folder(other("llama", "bf16"))
        model.weight_updater.begin_weight_update()
        model.model.load_weights([(name, t) for name, t in tensors if "layers.1.self_attn.q_proj" in name])
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj: only some .* 8192 of 16384 of weight"):
            model.weight_updater.end_weight_update(run_post_load=False)
        model.weight_updater.begin_weight_update()
        model.weight_updater.end_weight_update(run_post_load=False)
        assert torch.equal(logprobs(model, PROMPT), old)


@pytest.mark.parametrize("form", ["bf16", "modelopt"])
def test_weights_outside_of_a_session_are_refused(form: str, checkpoint, other) -> None:
    with runner(checkpoint("qwen3_moe", form), {"activation": "none"}) as model:
        old = logprobs(model, PROMPT)
        for part in ("o_proj.weight", "experts.3.up_proj.weight"):
            [tensor, *_] = [item for item in folder(other("qwen3_moe", form)) if item[0].endswith(part)]
            with pytest.raises(ValueError, match="begin_weight_update"):
                model.model.load_weights([tensor])
        assert torch.equal(logprobs(model, PROMPT), old)


def test_a_bad_checkpoint_is_rolled_back(checkpoint, tmp_path: Path) -> None:
    model = tiny_model("llama", seed=1)
    model.weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    bad = model.save(tmp_path / "bad")
    with runner(checkpoint("llama", "bf16"), {"activation": "none"}) as running:
        old = logprobs(running, PROMPT)
        # SGLang goes back to `model_path`, which it has just replaced; a good checkpoint loads afterwards all the same.
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: weight: 1 values are NaN"):
            running.weight_updater.update_weights_from_disk(str(bad), "auto")
        done, message = running.weight_updater.update_weights_from_disk(str(checkpoint("llama", "bf16")), "auto")
        assert done, message
        assert torch.equal(logprobs(running, PROMPT), old)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_never_more_than_one_layer_of_plain_weights(kind: str, form: str, checkpoint, monkeypatch) -> None:
    """Storage that is loaded into is alive for one layer at a time, given a checkpoint that comes layer by layer."""
    from nvfp4_plugin.sglang.loading import LayerWeights

    alive: dict[int, str] = {}
    most = 0
    materialize, replace = LayerWeights._materialize, LayerWeights._replace

    def materialized(self: LayerWeights, layer: torch.nn.Module) -> None:
        nonlocal most
        materialize(self, layer)
        alive[id(self)] = self._name
        most = max(most, len(alive))

    def replaced(self: LayerWeights, layer: torch.nn.Module) -> None:
        parameters = [getattr(layer, name) for name in self._slots]
        replace(self, layer)
        assert all(parameter.numel() == 0 for parameter in parameters)
        del alive[id(self)]

    monkeypatch.setattr(LayerWeights, "_materialize", materialized)
    monkeypatch.setattr(LayerWeights, "_replace", replaced)
    path = checkpoint(kind, form)
    weights = folder(path)
    with runner(path, {"activation": "none"}) as model:
        model.weight_updater.begin_weight_update()
        most = 0
        # As in a checkpoint that was written module by module.
        model.model.load_weights(sorted(weights, key=lambda item: item[0]))
        model.weight_updater.end_weight_update(run_post_load=False)
    assert not alive
    # By name, k_proj comes before o_proj before q_proj: at most two layers are open at a time.
    assert 1 <= most <= 2


def _broken(checkpoint, form: str, path: Path, change) -> Path:
    source = checkpoint("qwen3_moe", form)
    path.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_text(file.read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("form", "name", "value", "message"),
    [
        ("modelopt", "model.layers.0.self_attn.k_proj.weight_scale_2", None, "is missing from the checkpoint"),
        ("modelopt", "model.layers.1.mlp.experts.5.up_proj.weight_scale_2", float("inf"), "got inf"),
        ("compressed_tensors", "model.layers.0.mlp.experts.2.down_proj.weight_global_scale", 0.0, "got 0.0"),
        ("modelopt", "model.layers.0.self_attn.o_proj.input_scale", float("nan"), "missing from the checkpoint, or NaN"),
        ("bf16", "model.layers.1.mlp.experts.6.down_proj.weight", None, "28672 of 32768 of w2_weight"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(
    form: str, name: str, value: float | None, message: str, checkpoint, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = torch.full_like(tensors[name], value)

    path = _broken(checkpoint, form, tmp_path / "broken", change)
    options = {"activation": "nvfp4_per_tensor"} if "input_scale" in name else {"activation": "none"}
    module = name.rpartition(".experts.")[0] or name
    with pytest.raises(ValueError, match=f"{module}.*{message}"), runner(path, options):
        pass


def test_a_size_that_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    path = tiny_model("llama", head_dim=18).save(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.o_proj: K is 72.*ignore"), runner(path):
        pass
    with runner(path, {"ignore": ["*.o_proj"], "activation": "none"}) as model:
        assert logprobs(model, PROMPT).isfinite().all()
