"""From options to an attached network; third-party modules."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks.loading import (
    build_network,
    check_network,
    import_network_module,
    network_arguments,
    parameter_groups,
)
from networks.options import NetworkOptions
from tests.networks.test_lora_network import same_tensors, trained, unet_output
from tests.tiny import tiny_parts


@pytest.fixture
def parts():
    return tiny_parts("sd1")


def options(**given):
    return NetworkOptions(**{"network_module": "networks.lora", **given})


def problems_of(**given):
    return "\n".join(map(str, check_network(options(**given))))


def lora_file(folder, *, dim=4, name="lora.safetensors", seed=0):
    file = folder / name
    trained(tiny_parts("sd1"), dim=dim, seed=seed).save_weights(str(file), None, {})
    return file


# Checks before anything heavy


def test_nothing_heavy_is_imported_to_check():
    import subprocess

    program = (
        "import sys; from networks.loading import check_network; from networks.options import NetworkOptions;"
        "check_network(NetworkOptions(network_module='networks.lora', network_args=('conv_dim=4',)));"
        "check_network(NetworkOptions(network_module='networks.dylora', network_args=('unit=2',)));"
        "check_network(NetworkOptions(network_module='networks.oft', network_args=('enable_conv=1',)));"
        "check_network(NetworkOptions(network_module='lycoris.kohya', network_args=('algo=dylora',)));"
        "print(*{'torch', 'diffusers', 'transformers', 'lycoris'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_good_options_have_no_problems(tmp_path):
    assert problems_of(network_args=("conv_dim=4", "conv_alpha=1", "conv_dim=8")) == ""
    assert problems_of(network_weights=lora_file(tmp_path, dim=8), network_dim=8) == ""
    assert (
        problems_of(network_weights=lora_file(tmp_path, dim=8), dim_from_weights=True, network_args=("conv_dim=4",))
        == ""
    )
    assert problems_of(network_module="lycoris.kohya", network_args=("algo=loha", "anything=1")) == ""


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (None, "--network_module is missing"),
        ("networks.lora_flux", "for other models"),
        ("networks.loar", "no network module networks.loar"),
        ("networks.loar", "Did you mean networks.lora?"),
        ("no_such_package.kohya", "no_such_package.kohya is not installed"),
        ("__main__", "__main__ is not installed"),
        (".kohya", "'.kohya' is no import path"),
        ("lycoris..kohya", "'lycoris..kohya' is no import path"),
    ],
)
def test_modules_that_cannot_be_used(monkeypatch, module, what):
    # As it is where a script was started by its file.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert what in problems_of(network_module=module)


def test_lycoris_is_named_by_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "pip install lycoris-lora" in problems_of(network_module="lycoris.kohya")


def test_problems_of_arguments_and_files_come_together(tmp_path):
    other = tmp_path / "loha.safetensors"
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, other)
    text = problems_of(
        network_args=("conv_dmi=4",), network_weights=lora_file(tmp_path, dim=8), network_dim=4, base_weights=(other,)
    )
    assert "Did you mean conv_dim?" in text
    assert "has rank 8, the new network rank 4" in text
    assert "--dim_from_weights" in text
    assert "LoHa" in text


def test_problems_of_the_other_networks(tmp_path):
    file = tmp_path / "oft.safetensors"
    save_file({"oft_unet_x.oft_blocks": torch.zeros(2, 3, 3), "oft_unet_x.alpha": torch.tensor(1e-3)}, file)
    text = problems_of(
        network_module="networks.oft",
        network_weights=file,
        network_args=("enable_covn=1", "conv_dim=4"),
        network_train_text_encoder_only=True,
        scale_weight_norms=1.0,
    )
    for what in (
        "no part for the text encoder",
        "cannot be scaled down",
        "Did you mean enable_conv?",
        "networks.oft has no argument 'conv_dim'",
        "number of blocks 2, the new network number of blocks 4",
    ):
        assert what in text
    assert problems_of(network_module="networks.oft", network_weights=file, network_dim=2) == ""
    assert problems_of(network_module="networks.oft", base_weights=(file,)) == ""
    assert "not one of networks.oft" in problems_of(network_module="networks.oft", network_weights=lora_file(tmp_path))
    assert "not a LoRA" in problems_of(network_module="networks.dylora", network_weights=file)
    lora = lora_file(tmp_path, dim=6)
    given = {"network_module": "networks.dylora", "network_weights": lora, "dim_from_weights": True}
    assert problems_of(**given, network_args=("unit=3",)) == ""
    assert "unit=4 does not divide the rank 6" in problems_of(**given, network_args=("unit=4",))
    assert "networks.lora_fa has no argument 'unit'" in problems_of(
        network_module="networks.lora_fa", network_args=("unit=4",)
    )


def test_notices_of_oft():
    told = "\n".join(options(network_module="networks.oft", text_encoder_lr=(1e-4,)).notices())
    assert "1, the default, hardly limits" in told
    assert "--text_encoder_lr is without effect" in told
    assert options(network_module="networks.oft", network_alpha=1e-3).notices() == []


def test_a_scalar_of_lycoris_is_told():
    given = {"network_module": "lycoris.kohya"}
    assert "use_scalar is folded" in options(**given, network_args=("algo=lora", "use_scalar=True")).notices()[0]
    assert options(**given, network_args=("algo=lora", "use_scalar=False")).notices() == []


def test_arguments_for_the_metadata():
    assert network_arguments(options(network_args=(), network_dropout=0.1)) is None
    given = network_arguments(options(network_args=("algo=loha", "preset=a=b", "algo=lokr")))
    assert given == {"dropout": None, "algo": "lokr", "preset": "a=b"}
    assert network_arguments(options(network_args=("dropout=0.2",), network_dropout=0.1)) == {"dropout": "0.2"}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("x = 1", "no create_network and no create_network_from_weights"),
        ("import no_such_dependency", "needs no_such_dependency"),
        ("raise RuntimeError('too old')", "fails to import: RuntimeError: too old"),
    ],
)
def test_import_errors_are_explained(tmp_path, monkeypatch, source, what):
    (tmp_path / "strange_network.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strange_network", raising=False)
    with pytest.raises(UserError, match=what):
        import_network_module("strange_network")


def test_a_module_that_does_not_exist_in_an_installed_package():
    with pytest.raises(UserError, match="lycoris.nothing is not installed"):
        import_network_module("lycoris.nothing")


# Our own network


def test_the_network_depends_on_the_seed_alone(parts):
    state = torch.get_rng_state()
    first = build_network(options(network_dim=8, network_alpha=4), model=parts, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = build_network(options(network_dim=8, network_alpha=4), model=tiny_parts(), seed=1).state_dict()
    other = build_network(options(network_dim=8, network_alpha=4), model=tiny_parts(), seed=2).state_dict()
    unet_only = build_network(
        options(network_dim=8, network_alpha=4, network_train_unet_only=True), model=tiny_parts(), seed=1
    ).state_dict()
    assert same_tensors(first, second)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert all(name.startswith("lora_unet_") for name in unet_only)
    assert all(torch.equal(tensor, first[name]) for name, tensor in unet_only.items())
    assert first["lora_unet_mid_block_attentions_0_proj_in.alpha"] == 4.0


def test_text_encoder_only(parts):
    network = build_network(options(network_train_text_encoder_only=True), model=parts, seed=0)
    assert all(name.startswith("lora_te_text_model_encoder_") for name in network.state_dict())


def test_weights_are_loaded(parts, tmp_path, caplog):
    caplog.set_level("INFO")
    file = lora_file(tmp_path)
    network = build_network(options(network_weights=file), model=parts, seed=0)
    assert "load network weights from lora.safetensors: <All keys matched successfully>" in caplog.text
    assert same_tensors(network.state_dict(), load_file(file))


def test_what_does_not_match_is_counted(parts, tmp_path, caplog):
    network = build_network(
        options(network_weights=lora_file(tmp_path), network_train_unet_only=True, network_args=("conv_dim=2",)),
        model=parts,
        seed=0,
    )
    assert f"{3 * 18} unexpected keys, for instance lora_te_" in caplog.text
    assert "missing keys, for instance lora_unet_down_blocks_0_resnets_0" in caplog.text
    assert network.unet_loras[0].lora_up.weight.any()


def test_ranks_from_the_file(parts, tmp_path):
    file = lora_file(tmp_path, dim=7)
    network = build_network(
        options(network_weights=file, dim_from_weights=True, network_dropout=0.25), model=parts, seed=0
    )
    assert {module.rank for module in network.unet_loras} == {7}
    assert {module.dropouts.neuron for module in network.unet_loras} == {0.25}
    assert same_tensors(network.state_dict(), load_file(file))


def test_base_weights_are_merged_with_their_strengths(parts, tmp_path):
    files = (lora_file(tmp_path, name="a.safetensors"), lora_file(tmp_path, name="b.safetensors", dim=6, seed=1))
    build_network(options(base_weights=files, base_weights_multiplier=(0.5,)), model=parts, seed=0)
    merged = unet_output(parts)
    other = tiny_parts("sd1")
    plain = unet_output(other)
    for (dim, seed), multiplier in (((4, 0), 0.5), ((6, 1), 1.0)):
        network = trained(other, dim=dim, seed=seed)
        network.set_multiplier(multiplier)
        network.apply_to(other.text_encoder, other.unet)
    applied = unet_output(other)
    assert (merged - plain).abs().max() > 0.05
    assert torch.allclose(merged, applied, atol=1e-5)


def test_base_weights_of_another_model(parts, tmp_path):
    file = tmp_path / "sdxl.safetensors"
    save_file({"lora_te1_x.lora_down.weight": torch.ones(1, 2)}, file)
    with pytest.raises(UserError, match="LoRA for SDXL"):
        build_network(options(base_weights=(file,)), model=parts, seed=0)


def test_groups(parts):
    network = build_network(options(), model=parts, seed=0)
    groups = parameter_groups(network, text_encoder_lr=0.0, unet_lr=None, lr=1e-3)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-3)]
    trainable = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in groups[0]["params"]}
    with pytest.raises(UserError, match="nothing is trained"):
        parameter_groups(network, text_encoder_lr=0.0, unet_lr=0.0, lr=1e-3)


# Modules of other authors


class OldNetwork(torch.nn.Module):
    """Follows the contract of years ago: groups alone, two learning rates, dict views."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.spare = torch.nn.Linear(2, 2)

    def apply_to(self, text_encoder, unet, apply_text_encoder, apply_unet):
        self.applied = (apply_text_encoder, apply_unet)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [{"params": dict(self.linear.named_parameters()).values(), "lr": unet_lr}]


def old_module(create):
    module = types.ModuleType("old_network")
    module.create_network = create
    module.create_network_from_weights = create
    return module


def test_a_module_of_the_older_contract(parts, monkeypatch):
    received = {}

    def create(*positional, **named):
        received.update(positional=positional[:3], named=named)
        return OldNetwork()

    monkeypatch.setitem(sys.modules, "old_network", old_module(create))
    given = options(network_module="old_network", network_dim=3, network_args=("a=b",), network_dropout=0.5)
    first = build_network(given, model=parts, seed=4)
    torch.manual_seed(99)
    second = build_network(given, model=parts, seed=4)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert first.applied == (True, True)
    assert received == {
        "positional": (1.0, 3, 1.0),
        "named": {"neuron_dropout": 0.5, "dropout": 0.5, "a": "b"},
    }
    groups = parameter_groups(first, text_encoder_lr=None, unet_lr=None, lr=1e-3)
    assert groups == [{"params": [first.linear.weight, first.linear.bias], "lr": 1e-3}]
    assert not first.spare.weight.requires_grad


def test_failures_of_other_modules_are_explained(parts, monkeypatch):
    def create(*_positional, **_named):
        raise AssertionError("odd settings\nmore")

    monkeypatch.setitem(sys.modules, "old_network", old_module(create))
    with pytest.raises(UserError, match="old_network could not create the network: AssertionError: odd settings\n"):
        build_network(options(network_module="old_network"), model=parts, seed=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "arguments",
    [
        ("algo=loha",),
        ("algo=lokr", "factor=4"),
        ("algo=lora", "dora_wd=True"),
        ("algo=full",),
        ("algo=diag-oft",),
        ("algo=boft",),
        ("algo=glora",),
        ("algo=ia3",),
        ("algo=ia3", "preset=ia3"),
    ],
    ids=" ".join,
)
def test_lycoris_trains_saves_and_loads(parts, tmp_path, arguments):
    pytest.importorskip("lycoris")
    given = options(network_module="lycoris.kohya", network_dim=4, network_alpha=1.0, network_args=arguments)
    assert check_network(given) == []
    before = unet_output(parts)
    classes = {type(module).__name__ for module in parts.unet.modules()}
    network = build_network(given, model=parts, seed=3)
    assert {type(module).__name__ for module in parts.unet.modules()} == classes
    assert torch.allclose(unet_output(parts), before, atol=1e-6)
    groups = parameter_groups(network, text_encoder_lr=1e-2, unet_lr=1e-2, lr=1e-2)
    assert [group["name"] for group in groups] == ["textencoder", "unet"]
    assert all(isinstance(group["params"], list) for group in groups)
    network.on_epoch_start(parts.text_encoder, parts.unet)
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    ids = torch.randint(0, 49000, (1, 77), generator=generator)
    for _ in range(2):
        context = parts.text_encoder(ids).last_hidden_state
        parts.unet(noisy, torch.tensor([300]), context).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    applied = unet_output(parts)
    assert (applied - before).abs().max() > 1e-3
    file = tmp_path / "net.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": "lycoris.kohya"})
    names = load_file(file).keys()
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in names)
    assert any(name.startswith("lora_unet_down_blocks_0_attentions_0_") for name in names)
    again = tiny_parts("sd1")
    build_network(replace(given, network_weights=file), model=again, seed=9).eval()
    assert torch.allclose(unet_output(again), applied, atol=1e-5)
    from_file = tiny_parts("sd1")
    build_network(
        options(network_module="lycoris.kohya", network_weights=file, dim_from_weights=True), model=from_file, seed=9
    ).eval()
    assert torch.allclose(unet_output(from_file), applied, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("algo=abba",), "has no algorithm 'abba'\n.*\n.*It has lora, "),
        (("algo=lohaa",), "Did you mean loha?"),
    ],
)
def test_an_algorithm_that_lycoris_has_not(parts, arguments, what):
    pytest.importorskip("lycoris")
    with pytest.raises(UserError, match=what):
        build_network(options(network_module="lycoris.kohya", network_args=arguments), model=parts, seed=0)


def test_a_choice_of_layers_that_matches_none(parts, tmp_path):
    pytest.importorskip("lycoris")
    preset = tmp_path / "preset.toml"
    preset.write_text('unet_target_module = ["Nothing"]\nunet_target_name = []\ntext_encoder_target_module = []\n')
    given = options(network_module="lycoris.kohya", network_args=("algo=lora", f"preset={preset}"))
    with pytest.raises(UserError, match=r"lycoris\.kohya found no layer to adapt"):
        build_network(given, model=parts, seed=0)


@pytest.mark.parametrize("algorithm", ["dylora", "TLoRA"])
def test_algorithms_of_lycoris_that_cannot_work_are_refused(algorithm):
    text = problems_of(network_module="lycoris.kohya", network_args=(f"algo={algorithm}",))
    assert f"LyCORIS's {algorithm.lower()}" in text


def test_lycoris_starts_from_the_seed_and_its_presets_do_not_leak():
    kohya = pytest.importorskip("lycoris.kohya")
    targets = list(kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE)
    preset, maker = dict(kohya.PRESET["ia3"]), vars(kohya.FullModule)["make_module_from_state_dict"]
    given = options(network_module="lycoris.kohya", network_dim=2, network_args=("algo=loha", "preset=attn-mlp"))
    first = build_network(given, model=tiny_parts(), seed=1).state_dict()
    torch.manual_seed(77)
    second = build_network(given, model=tiny_parts(), seed=1).state_dict()
    assert same_tensors(first, second)
    assert targets == kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE
    assert preset == kohya.PRESET["ia3"]
    assert maker is vars(kohya.FullModule)["make_module_from_state_dict"]


def test_a_file_for_another_kind_of_network_is_refused(parts, tmp_path):
    pytest.importorskip("lycoris")
    given = options(network_module="lycoris.kohya", network_args=("algo=loha",), network_weights=lora_file(tmp_path))
    with pytest.raises(UserError, match="nothing in the file belongs to this network"):
        build_network(given, model=parts, seed=0)
