"""The files of configs/ are accepted by the programs that read them, and do what their comments say."""

import json
import logging
import shlex

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from diffusers import BitsAndBytesConfig, ZImageTransformer2DModel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from running import ROOT, launch
from tiny import train_args


CONFIGS = ROOT / "configs"


def names(pattern):
    return sorted(path.name for path in CONFIGS.glob(pattern))


def launcher_arguments(config):
    """The arguments of `accelerate launch --config_file configs/CONFIG`, completed by accelerate itself."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "script.py"])
    return _validate_launch_command(arguments)[0]


def requirements(*paths):
    lines = [line.partition("#")[0].strip() for path in paths for line in path.read_text("utf-8").splitlines()]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}


@pytest.mark.parametrize("config", names("*.yaml"))
def test_accelerate_knows_every_key(config):
    loaded = load_config_from_file(str(CONFIGS / config))  # raises for an unknown key at the top
    launcher_flags = vars(launch_command_parser().parse_args(["script.py"]))
    sections = [section for section in vars(loaded).values() if isinstance(section, dict)]
    assert {key for section in sections for key in section} <= set(launcher_flags)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("cpu.yaml", {"use_cpu": True, "multi_gpu": False, "use_fsdp": False, "num_processes": 1}),
        ("one_gpu.yaml", {"use_cpu": False, "multi_gpu": False, "use_fsdp": False, "num_processes": 1}),
        ("compile.yaml", {"use_cpu": False, "multi_gpu": False, "use_fsdp": False, "num_processes": 1}),
        ("multi_gpu.yaml", {"use_cpu": False, "multi_gpu": True, "use_fsdp": False, "num_machines": 1}),
        ("multi_node.yaml", {"use_cpu": False, "multi_gpu": True, "use_fsdp": False, "num_machines": 2}),
        ("fsdp.yaml", {"use_cpu": False, "multi_gpu": False, "use_fsdp": True, "num_machines": 1}),
    ],
)
def test_launcher_chooses_the_kind_of_distribution_that_the_name_says(config, expected):
    arguments = vars(launcher_arguments(config))
    assert {name: arguments[name] for name in expected} == expected


def test_every_accelerate_config_is_checked_for_its_kind():
    (parametrize,) = test_launcher_chooses_the_kind_of_distribution_that_the_name_says.pytestmark
    assert [config for config, _ in sorted(parametrize.args[1])] == names("*.yaml")


def test_fsdp_config_names_nothing_that_fsdp2_ignores():
    ignored = ("sharding_strategy", "forward_prefetch", "backward_prefetch", "sync_module_states", "use_orig_params")
    config = load_config_from_file(str(CONFIGS / "fsdp.yaml"))
    assert not {f"fsdp_{name}" for name in ignored} & set(config.fsdp_config)


def test_fsdp_config_shards_each_transformer_block_without_a_warning(tiny_model, monkeypatch, caplog):
    for name, value in prepare_multi_gpu_env(launcher_arguments("fsdp.yaml")).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        plugin = FullyShardedDataParallelPlugin()
        transformer = ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
        plugin.set_auto_wrap_policy(transformer)
    blocks = [*transformer.layers, *transformer.noise_refiner, *transformer.context_refiner]
    sharded = [
        module
        for module in transformer.modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    assert {id(module) for module in sharded} == {id(block) for block in blocks}
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    assert not [record for record in caplog.records if record.name.startswith("accelerate")]


def test_compile_config_compiles_the_repeated_block(monkeypatch):
    _, environment = prepare_simple_launcher_cmd_env(launcher_arguments("compile.yaml"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = TorchDynamoPlugin()
    assert (plugin.backend.value, plugin.use_regional_compilation) == ("INDUCTOR", True)


@pytest.mark.slow
def test_cpu_config_trains(tiny_model, photos, tmp_path):
    config_file = f"--config_file={CONFIGS / 'cpu.yaml'}"
    launch(*train_args(tiny_model, photos, tmp_path / "out"), launcher_flags=[config_file])
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("config", names("*.json"))
def test_quantization_config_keeps_the_embedders_whole(config, tiny_model):
    fields = json.loads((CONFIGS / config).read_text("utf-8"))
    quantization = BitsAndBytesConfig(**fields)
    assert fields.keys() <= quantization.to_dict().keys()
    assert quantization.load_in_4bit != quantization.load_in_8bit
    transformer = ZImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    kept = {name for name, _ in transformer.named_children()} - {"layers", "noise_refiner", "context_refiner"}
    with_linear = {
        name for name in kept if any(isinstance(m, torch.nn.Linear) for m in getattr(transformer, name).modules())
    }
    assert set(quantization.llm_int8_skip_modules) == with_linear


def test_nf4_config_can_be_sharded():
    quantization = BitsAndBytesConfig(**json.loads((CONFIGS / "nf4.json").read_text("utf-8")))
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_quant_storage.is_floating_point  # FSDP shards no integer weights


def parse_recipes(recipes, model, data):
    from train_dreambooth_lora_z_image import parse_args

    required = [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={data}", "--instance_prompt=x"]
    return vars(parse_args([*recipes, *required]))


@pytest.mark.parametrize("recipe", names("*.args"))
def test_recipe_means_the_same_as_its_flags_typed_out(recipe, tiny_model, photos, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name files in configs/
    lines = (CONFIGS / recipe).read_text("utf-8").splitlines()
    flags = [word for line in lines for word in shlex.split(line, comments=True)]
    from_recipe = parse_recipes([f"@configs/{recipe}"], tiny_model, photos)
    assert from_recipe == parse_recipes(flags, tiny_model, photos)
    assert from_recipe != parse_recipes([], tiny_model, photos)


def test_recipes_for_a_card_and_for_a_subject_combine(tiny_model, photos, monkeypatch):
    monkeypatch.chdir(ROOT)
    both = parse_recipes(["@configs/12gb.args", "@configs/style.args"], tiny_model, photos)
    assert (both["base_model_precision"], both["rank"]) == ("int8", 32)


def test_constraints_pin_every_requirement_to_a_version_in_its_range():
    needed = requirements(ROOT / "requirements_z_image.txt", ROOT / "tests" / "requirements.txt")
    pins = requirements(CONFIGS / "constraints.txt")
    for name, requirement in needed.items():
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def test_constraints_pin_versions_that_every_machine_can_install():
    for name, requirement in requirements(CONFIGS / "constraints.txt").items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version, name
