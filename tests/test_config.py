"""Recipes compose, and every way of getting one wrong is told in one paragraph that names the remedy."""

import pytest
from omegaconf import OmegaConf

from lowprec.config import RECIPE_FILE, resolve
from lowprec.errors import UserError
from lowprec.option import option_names
from lowprec.overrides import ALIASES, OPTION_GROUPS
from lowprec.recipes import SHIPPED, copy_recipe, purpose, shipped_recipes

MODEL_AND_DATA = ["model.model_name_or_path=some/model", "data.path=chats.jsonl"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_composes(name):
    recipe, messages = resolve(name, [] if name == "quickstart" else MODEL_AND_DATA)
    assert recipe.name == name and messages == []
    assert recipe.train.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_says_its_purpose_command_and_cost(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert f"#   lowprec train {name}" in text and "# Cost:" in text and purpose(name)


@pytest.mark.parametrize("group", OPTION_GROUPS)
def test_every_option_composes_with_a_recipe(group, tmp_path):
    for choice in option_names(group):
        extra = {"none": ["weights=bf16"], "ssd": [f"state_store.path={tmp_path}"]}.get(choice, [])
        recipe, _ = resolve("lora", [*MODEL_AND_DATA, f"{group}={choice}", *extra])
        assert recipe.choice(group) == choice


def test_a_resolved_recipe_composes_to_itself(tmp_path):
    recipe, _ = resolve("qlora_nf4", [*MODEL_AND_DATA, "adapter.r=4", "weights.block_size=128", "train.seed=7"])
    (tmp_path / RECIPE_FILE).write_text(recipe.to_yaml())
    again, _ = resolve(str(tmp_path / RECIPE_FILE))
    assert again.to_yaml() == recipe.to_yaml()
    assert again.name == "qlora_nf4"


def test_a_user_s_recipe_inherits_a_shipped_one_and_has_presets_of_its_own(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ours.yaml").write_text("path: ours.jsonl\nmax_length: 99\n")
    (tmp_path / "mine.yaml").write_text("defaults: [lora, override data: ours, _self_]\nadapter:\n  r: 3\n")
    recipe, _ = resolve(str(tmp_path / "mine.yaml"), ["model.model_name_or_path=m"])
    assert (recipe.name, recipe.adapter.r, recipe.data.path, recipe.data.max_length) == ("mine", 3, "ours.jsonl", 99)
    assert recipe.train.gradient_checkpointing == "full"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.max_step=3", "train.max_steps"),
        ("+train.max_step=3", "train.max_steps"),
        ("max_steps=3", "train.max_steps"),
        ("trian.max_steps=3", "train.max_steps"),
        ("adapter.rank_=3", "adapter.rank_pattern"),
        ("weights.block_size=64", "weights=bf16 has no key 'block_size'"),
        ("weights=nf5", "nf4"),
        ("hydra.run.dir=x", "Hydra itself"),
        ("~adapter", "delete"),
        ("train.max_steps=abc", "train.max_steps"),
        ("train.max_steps=1,2", "-m"),
        ("train.max_steps=0", "train.max_steps=0 must be 1 or more"),
        ("train.max_grad_norm=-1", "null"),
        ("train.max_steps", "key=value"),
        ("data.path=[a", "key=value"),
        ("data=nowhere", "python_docs"),
        ("model.dtype=bf17", "bf16"),
        ("train.report_to=wandb", "in brackets"),
        ("data.columns.prmpt=question", "Did you mean data.columns.prompt?"),
        ("adapter.modules_to_save=lm_head", "in brackets"),
        ("state_store.path=/x", "state_store=ssd has it"),
        ("optimizer=adamw_8bit optimizer.master=none", "optimizer=adamw has it"),
    ],
)
def test_mistakes_name_the_remedy(override, named):
    with pytest.raises(UserError) as error:
        resolve("lora", [*MODEL_AND_DATA, *override.split()])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_user_s_file_names_the_nearest(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [lora, _self_]\ntrain:\n  max_step: 3\n")
    with pytest.raises(UserError, match="Did you mean train.max_steps"):
        resolve(str(tmp_path / "mine.yaml"), MODEL_AND_DATA)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no keys"),
        ("train: [", "not readable as YAML"),
        ("defaults: [nothing_here, _self_]\n", "lora"),
        ("defaults: [lora, data: python_docs, _self_]\n", "override data"),
    ],
)
def test_broken_files(tmp_path, text, named):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        resolve(str(tmp_path / "mine.yaml"))


def test_a_file_that_hides_a_shipped_one_is_refused(tmp_path):
    (tmp_path / "lora.yaml").write_text("defaults: [base_recipe, _self_]\n")
    (tmp_path / "mine.yaml").write_text("defaults: [lora, _self_]\n")
    for name in ("lora", "mine"):
        with pytest.raises(UserError, match="Rename it"):
            resolve(str(tmp_path / f"{name}.yaml"), MODEL_AND_DATA)


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match="quickstart"):
        resolve("quikstart")


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_accepted_and_named(alias):
    base = [pair for pair in MODEL_AND_DATA if not pair.startswith(ALIASES[alias])]
    recipe, messages = resolve("lora", [*base, f"{alias}=7"])
    assert messages == [f"{alias} is called {ALIASES[alias]} here."]
    group, _, leaf = ALIASES[alias].partition(".")
    assert str(getattr(getattr(recipe, group), leaf)) in ("7", "7.0")


def test_alias_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [lora, _self_]\nsequence_len: 77\nadapter:\n  lora_r: 5\n")
    recipe, messages = resolve(str(tmp_path / "mine.yaml"), MODEL_AND_DATA)
    assert (recipe.data.max_length, recipe.adapter.r) == (77, 5)
    assert len(messages) == 2 and "data.max_length" in messages[0]


def test_alias_and_key_with_different_values():
    with pytest.raises(UserError, match=r"lr=1e-4.*optimizer\.learning_rate=2e-4"):
        resolve("lora", [*MODEL_AND_DATA, "lr=1e-4", "optimizer.learning_rate=2e-4"])
    recipe, _ = resolve("lora", [*MODEL_AND_DATA, "lr=1e-4", "optimizer.learning_rate=1e-4"])
    assert recipe.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["weights=nf4", "adapter=none"], "adapter=lora"),
        (["data.streaming=true"], "train.max_steps"),
        (["adapter=none", "model.dtype=fp16"], "model.dtype=bf16"),
        (["state_store=ssd"], "state_store.path"),
        (["optimizer.warmup_steps=9", "train.max_steps=8"], "optimizer.warmup_steps=9 is more than the run's 8 steps"),
        (
            ["optimizer.lr_scheduler_kwargs={num_cycle:2}", "optimizer.lr_scheduler_type=cosine", "train.max_steps=8"],
            "num_cycles",
        ),
        (["optimizer=adamw_8bit", "state_store=cpu"], "optimizer=adamw"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(overrides, named):
    with pytest.raises(UserError, match=named):
        resolve("lora", [*MODEL_AND_DATA, *overrides])


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"model\.model_name_or_path"):
        resolve("lora", ["data.path=x"])


def test_copied_recipe_composes(tmp_path):
    target = copy_recipe("full", str(tmp_path / "new" / "my_full.yaml"))
    assert resolve(str(target), MODEL_AND_DATA)[0].optimizer.learning_rate == 2e-5
    for wrong, named in (("my_full.txt", ".yaml"), ("full.yaml", "shipped"), ("new/my_full.yaml", "exists")):
        with pytest.raises(UserError, match=named):
            copy_recipe("full", str(tmp_path / wrong))


@pytest.mark.parametrize(
    "written", ["kwargs.num_cycles=2", "+kwargs.num_cycles=2", "++kwargs.num_cycles=2", "kwargs={num_cycles:2}"]
)
def test_what_is_below_a_dict_is_free(written, tmp_path):
    override = written.replace("kwargs", "optimizer.lr_scheduler_kwargs")
    cosine = "optimizer.lr_scheduler_type=cosine_with_restarts"
    recipe, _ = resolve("lora", [*MODEL_AND_DATA, cosine, override, "adapter.rank_pattern.q_proj=4"])
    assert recipe.optimizer.lr_scheduler_kwargs == {"num_cycles": 2} and recipe.adapter.rank_pattern == {"q_proj": 4}
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert resolve(str(tmp_path / "again.yaml"))[0].optimizer.lr_scheduler_kwargs == {"num_cycles": 2}


def test_nested_option_fields_survive_the_round_trip():
    recipe, _ = resolve("lora", [*MODEL_AND_DATA, "adapter.target_modules=[q_proj,v_proj]"])
    assert OmegaConf.create(recipe.to_yaml()).adapter.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("key", ["model.model_name_or_path", "data.path", "train.output_dir"])
def test_what_a_shell_variable_left_empty_is_named(key):
    given = {"model.model_name_or_path": "x", "data.path": "y", key: ""}
    with pytest.raises(UserError, match=rf"{key} is empty"):
        resolve("lora", [f"{name}={value}" for name, value in given.items()])


def test_a_seed_that_no_generator_takes_is_named():
    with pytest.raises(UserError, match=r"train\.seed=-1"):
        resolve("lora", ["model.model_name_or_path=x", "data.path=y", "train.seed=-1"])
