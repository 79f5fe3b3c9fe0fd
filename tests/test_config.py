"""Profiles: found, parsed, refused with file and key; and every field of every config is read somewhere."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest

import fgalign
from fgalign.config import (
    ConfigError,
    Profile,
    Section,
    find_root,
    known_profiles,
    load_profile,
    parse_section,
)

SOURCE = Path(fgalign.__file__).parent
ROOT = Path(__file__).resolve().parents[1]


class Inner(Section):
    rate: float = 0.5


class Needed(Section):
    learning_rate: float


class Outer(Section):
    name: str
    count: int = 3
    inner: Inner | None = Inner()
    needed: Needed | None = None


@pytest.fixture
def root(tmp_path):
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text("profile: mini\nseeds: [1, 2]\nsft: {name: x, inner: {rate: 1}}\n")
    other = tmp_path / "reproduce" / "profiles" / "human"
    other.mkdir(parents=True)
    (other / "params.yaml").write_text("profile: human\nseeds: [7]\n")
    return tmp_path


def test_load(root, monkeypatch):
    monkeypatch.delenv("FGALIGN_PROFILE", raising=False)
    mini = load_profile(root=root)
    assert (mini.name, mini.seeds, mini.file) == ("mini", [1, 2], root / "params.yaml")
    assert (mini.data, mini.results) == (root / "data" / "mini", root / "results" / "mini")
    assert mini.section("sft", Outer) == Outer(name="x", count=3, inner=Inner(rate=1.0))
    assert load_profile("human", root).seeds == [7]
    monkeypatch.setenv("FGALIGN_PROFILE", "human")
    assert load_profile(root=root).name == "human"
    assert load_profile("mini", root=root).name == "mini"
    assert known_profiles(root) == ["mini", "human"]


def test_root(root, tmp_path_factory):
    assert find_root(root / "src" / "fgalign") == root
    outside = tmp_path_factory.mktemp("outside")
    with pytest.raises(ConfigError, match="not inside the fgalign repository"):
        find_root(outside)


def test_unknown_profile(root):
    with pytest.raises(ConfigError, match="unknown profile 'maxi'; expected one of mini, human"):
        load_profile("maxi", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profile: [", r"params\.yaml: not YAML: "),
        ("profile: human", r"params\.yaml: profile: expected 'mini', found 'human'"),
        ("- 1", r"params\.yaml: profile: expected 'mini', found \[1\]"),
    ],
)
def test_bad_file(root, text, message):
    (root / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile("mini", root)


@pytest.mark.parametrize(
    "name", ["api_key", "Token", "password", "openai_api_key", "api-key", "hf_token", "key_variable"]
)
def test_a_secret_in_a_profile_is_refused_before_anything_reads_it(root, name):
    path = root / "params.yaml"
    path.write_text(f"profile: mini\nannotator:\n  other: [{{{name}: sk-123}}]\n")
    with pytest.raises(ConfigError, match=rf"params\.yaml: annotator: other: 0: {name}: a secret must not") as error:
        load_profile("mini", root)
    assert "sk-123" not in str(error.value)
    for other in ("headers: {Authorization: Bearer sk-123}", 'base_url: "https://u:sk-123@h/v1"', "auth: [sk-123]"):
        path.write_text(f"profile: mini\nannotator:\n  {other}\n")
        with pytest.raises(ConfigError, match=r"params\.yaml: annotator: .*: a secret must not") as error:
            load_profile("mini", root)
        assert "sk-123" not in str(error.value)
    path.write_text("profile: mini\nannotator: {key_variable: MY_KEY, max_tokens: 4, token: null, unit: token}\n")
    assert load_profile("mini", root).params["annotator"]["max_tokens"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "needed_token_model: [a]",
            r"params\.yaml: needed_token_model: no such key; did you mean needed_token_models\?",
        ),
        ("zzz: 1", r"params\.yaml: zzz: no such key; known keys: profile, root, "),
        ("seeds: [1]\nsft: {a: 1}\nseeds: [7]", r"params\.yaml:4: the key 'seeds' stands twice in this section"),
        ("sft:\n  a: {b: 1, b: 1}", r"params\.yaml:3: the key 'b' stands twice"),
        ("methods:", r"params\.yaml: methods: expected a section, found None"),
        ("base_model: x", r"params\.yaml: base_model: expected a section, found 'x'"),
        ("methods: {dpo: null}", r"params\.yaml: methods: expected a section under each name, found None"),
        ("token_models: 3", r"params\.yaml: token_models: expected a section under each name, found 3"),
    ],
)
def test_a_slip_in_a_profile_is_refused(root, text, message):
    (root / "params.yaml").write_text(f"profile: mini\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_profile("mini", root)


def test_a_merged_section_may_override_keys(root):
    text = "sft: &a {x: 1, y: 2}\nrm_edit: &b {<<: *a, x: 3}\nrm_token: {<<: *b, y: 4}\nstudies:\n"
    (root / "params.yaml").write_text(f"profile: mini\n{text}")
    params = load_profile("mini", root).params
    assert params["rm_token"] == {"x": 3, "y": 4} and params["studies"] is None


def test_a_profile_that_is_not_utf8(root):
    (root / "params.yaml").write_bytes("profile: mini # café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"params\.yaml: not YAML: .*utf-8"):
        load_profile("mini", root)


def test_missing_section(root):
    with pytest.raises(ConfigError, match=r"params\.yaml: section `labels` is missing; expected name, count, inner"):
        load_profile("mini", root).section("labels", Outer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # What stands there may be a secret.
        ({"name": "x", "cuont": 4}, r"^here\.cuont: no such key; did you mean count\?$"),
        ({"name": "x", "inner": {"rat": 4}}, r"^here\.inner\.rat: no such key; did you mean rate\?$"),
        ({"name": "x", "pass": "abc"}, r"^here\.pass: no such key; known keys: name, count, inner, needed$"),
        # The slip comes before what it leaves missing, and before other errors.
        ({"count": "many", "nmae": "x"}, r"^here\.nmae: no such key; did you mean name\?$"),
        (
            {"name": "x", "needed": {"learning_rat": 1}},
            r"^here\.needed\.learning_rat: .*; did you mean learning_rate\?$",
        ),
        ({"name": "x", "count": "many"}, r"^here\.count: .*integer.*found 'many'$"),
        ({"count": 1}, r"^here\.name: Field required$"),
        ([1], r"^here\.\(section\): .*found \[1\]$"),
    ],
)
def test_bad_section(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(value, Outer, "here")


@pytest.mark.parametrize("seeds", [None, [], [1, 1], "1", 3, ["a"], [True], [1.5], [[1]], [-1], [2**32]])
def test_bad_seeds(tmp_path, seeds):
    profile = Profile("mini", tmp_path, {"seeds": seeds}, tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=r"params\.yaml: seeds: expected a list of different integers from 0 "):
        _ = profile.seeds


# --- every field of every config is read ------------------------------------------------------------------------------

CONFIGS = {"Section", "FineGrainedPPOConfig", "FIGAConfig"}
EXCEPTIONS = {
    "Architecture.tie_word_embeddings": "handed to transformers with the others, in build_on_meta",
    "FIGAConfig.remove_unused_columns": "transformers' Trainer reads it",
    "Questions.validation": "read by the split's name, in split_questions",
    "Questions.test": "read by the split's name, in split_questions",
}
"""``Class.field`` of fields that are nowhere an attribute access in the package, each with its reason."""


def config_classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def unread_fields(sources: dict[str, str]) -> set[str]:
    """``Class.field`` of config fields whose name is nowhere an attribute access outside their class's definition.

    Configs are the classes named in CONFIGS and all that inherit from ``Section``, directly or not.
    """
    trees = {path: ast.parse(text) for path, text in sources.items()}
    classes = [(path, node) for path, tree in trees.items() for node in config_classes(tree)]
    sections = set(CONFIGS)
    while True:
        more = {
            node.name
            for _, node in classes
            if node.name not in sections and any(ast.unparse(base).split(".")[-1] in sections for base in node.bases)
        }
        if not more:
            break
        sections |= more
    reads: dict[str, list[tuple[str, int]]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.setdefault(node.attr, []).append((path, node.lineno))
    unread = set()
    for path, node in classes:
        if node.name not in sections:
            continue
        for item in node.body:
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            outside = [
                where
                for where in reads.get(item.target.id, [])
                if not (where[0] == path and node.lineno <= where[1] <= node.end_lineno)
            ]
            if not outside:
                unread.add(f"{node.name}.{item.target.id}")
    return unread


def package() -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in SOURCE.rglob("*.py")}


def test_every_config_field_is_read():
    assert unread_fields(package()) == set(EXCEPTIONS)


def test_the_check_sees_a_field_that_nothing_reads():
    text = """
class Mine(Section):
    read: int = 1
    unread: int = 2
    own: int = 3
    written: int = 4

    def method(self):
        return self.own

class Child(Mine):
    late: int = 5

def use(config):
    config.written = 3
    return config.read
"""
    assert unread_fields({"a.py": text}) == {"Mine.unread", "Mine.own", "Mine.written", "Child.late"}


def test_the_check_finds_the_configs():
    names = {node.name for text in package().values() for node in config_classes(ast.parse(text))}
    assert CONFIGS - names == set()


@pytest.mark.parametrize(
    ("file", "name"), [("ppo_trainer.py", "FineGrainedPPOConfig"), ("methods/figa.py", "FIGAConfig")]
)
def test_trainers_read_their_own_fields(file, name):
    """Stricter: as ``args.<field>``, in the trainer's own file."""
    tree = ast.parse((SOURCE / file).read_text("utf-8"))
    (config,) = (node for node in config_classes(tree) if node.name == name)
    fields = {item.target.id for item in config.body if isinstance(item, ast.AnnAssign)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    assert fields - read - {field.split(".")[1] for field in EXCEPTIONS} == set()


OTHER_OPTIM = {
    "learning_rate": 0.5,
    "epochs": 7.0,
    "max_steps": 7,
    "batch_size": 7,
    "accumulation": 7,
    "warmup_steps": 7,
    "schedule": "linear",
    "weight_decay": 0.5,
    "adam_beta2": 0.5,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": True,
    "sampling": "group_by_length",
}
OTHER_LORA = {"r": 7, "alpha": 7, "dropout": 0.5, "target_modules": ["q_proj"]}


def test_every_field_of_an_optimiser_reaches_the_trainer():
    from fgalign.training import LoraSection, OptimConfig, peft_config, trainer_arguments

    def arguments(**options):
        optim = OptimConfig(**{"learning_rate": 0.1, **options})
        return trainer_arguments(optim, output_dir=Path("out"), seed=1, device="cpu", bf16=False)

    def adapter(**options):
        config = peft_config(OptimConfig(learning_rate=0.1, lora=LoraSection(**options)), "CAUSAL_LM")
        return {key: value for key, value in config.to_dict().items() if key != "runtime_config"}

    assert set(OTHER_OPTIM) == set(OptimConfig.model_fields) - {"compile", "lora", "max_tokens"}
    assert set(OTHER_LORA) == set(LoraSection.model_fields)
    for name, value in OTHER_OPTIM.items():
        changed = {key for key, found in arguments(**{name: value}).items() if found != arguments().get(key)}
        assert len(changed) == 1 and arguments(**{name: value})[changed.pop()] == value, name
    for name, value in OTHER_LORA.items():
        assert adapter(**{name: value}) != adapter(), name
    assert peft_config(OptimConfig(learning_rate=0.1), "CAUSAL_LM") is None


# --- the papers' profile: every hyperparameter and where its value is from --------------------------------------------

PAPER = ROOT / "reproduce" / "profiles" / "paper" / "params.yaml"
NO_HYPERPARAMETERS = {
    "profile", "root", "params_file", "judge_tables", "edit_likelihood", "report", "plan", "token_models",
    "needed_token_models", "studies", "sweeps", "search", "world", "papers", "runtime.device", "runtime.threads",
    "other_judges.reward_model.title", "other_judges.reward_model.trained_on",
}  # fmt: skip
FROM_THE_PAPERS = {
    "S": """annotator.task methods.figa.kind methods.figa.response methods.ppo_token.needs""",
    "C": """
        runtime.dtype annotator.model labels.unit methods.figa.signal methods.figa.unit methods.figa.alpha
        methods.figa.beta methods.figa.gamma methods.figa.threshold methods.figa.threshold_reading
        methods.figa.max_length methods.figa.optim.learning_rate methods.figa.optim.epochs methods.figa.optim.batch_size
        methods.figa.optim.schedule methods.figa.optim.weight_decay""",
    "R": """
        source.name source.n_demonstrations source.n_test_prompts source.n_train_preferences annotator.name
        base_model.kind base_model.name methods.figa.needs methods.ppo_preference.kind methods.ppo_preference.needs
        methods.ppo_preference.summed methods.ppo_preference.trainer.advantage methods.ppo_edit.needs
        evaluation.prompts benchmarks.tasks""",
}
"""What stands in the papers or in the released code; everything else is our choice, [O]."""
AT_THE_DEFAULT = {
    "optim": "max_steps max_tokens weight_decay adam_beta2 max_grad_norm sampling lora compile",
    "figa": """signal unit scorer response pairs alpha beta gamma threshold threshold_reading max_length
        score_batch_size""",
    "ppo": "discrete summed lora",
    "trainer": """vllm_memory reuse_sampling value_learning_rate warmup_updates schedule weight_decay max_grad_norm
        fused temperature advantage group_size gamma whiten_advantages clip_range clip_range_value value_coef compile
        kl_controller kl_target kl_horizon kl_estimator reward_scale calibration_prompts whiten_rewards
        missing_eos_penalty""",
    "evaluation": "prompts pairs examples seed",
    "judge_options": "prompt temperature seed max_failed",
    "annotator": "prompt responses temperature max_tokens seed max_failed",
    "judge": "start",
    "rm_token": "loss",
    "source": "preferences seed n_demonstrations n_train_prompts n_validation_prompts n_test_prompts "
    "n_train_preferences n_validation_preferences n_test_preferences",
}
"""Keys of the papers' profile that say what the package would do without them."""


def scalars(node, path=""):
    """Dotted name and line of each value of a YAML tree as it is written: nothing twice, aliases and merges nowhere."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{path}.{key.value}".lstrip(".")
        if key.value != "<<" and value.start_mark.line >= key.start_mark.line:
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from scalars(value, name)
            else:
                yield name, key.start_mark.line


def test_every_value_of_the_papers_profile_says_where_it_is_from():
    import yaml

    text = PAPER.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for name, line in scalars(yaml.compose(text)):
        if not {name, name.split(".")[0]} & NO_HYPERPARAMETERS:
            mark = re.search(r"  # \[([SCRO])\]", lines[line])
            assert mark, f"line {line + 1}: {name}: expected a mark such as [O]"
            found[name] = mark[1]
    stated = {name: mark for mark, names in FROM_THE_PAPERS.items() for name in names.split()}
    assert {name: mark for name, mark in found.items() if mark != "O"} == stated
    # Spot checks that nothing is skipped: one of each depth, and one written in braces.
    assert {"seeds", "sft.max_length", "evaluation.judge_options.model", "methods.figa.optim.epochs"} <= set(found)
    assert found["methods.ppo_preference.curve.every"] == "O"


def paper_sections(params):
    """The sections with hyperparameters, parsed: name to configuration."""
    from fgalign.annotate.llm import LLMAnnotatorConfig
    from fgalign.evaluation.config import EvaluationConfig
    from fgalign.evaluation.llm_judge import LLMJudgeConfig
    from fgalign.ppo_trainer import FineGrainedPPOConfig
    from fgalign.sft import SFTSection
    from fgalign.sources.alpaca_farm import AlpacaFarmConfig
    from fgalign.stages.judge_model import judge_model_config
    from fgalign.stages.train import method_config, reward_config

    profile = Profile("paper", ROOT, params, PAPER)
    found = {"sft": profile.section("sft", SFTSection), "evaluation": profile.section("evaluation", EvaluationConfig)}
    found |= {name: reward_config(profile, name) for name in ("rm_preference", "rm_edit", "rm_token")}
    found |= {name: method_config(profile, name)[1] for name in params["methods"]}
    found["judge"] = judge_model_config(profile, "preferences")
    for name, kind in {"source": AlpacaFarmConfig, "annotator": LLMAnnotatorConfig}.items():
        found[name] = kind(**{key: value for key, value in params[name].items() if key != "name"})
    found["judge_options"] = LLMJudgeConfig(**params["evaluation"]["judge_options"])
    trainers = {
        f"{name}.trainer": FineGrainedPPOConfig(output_dir="", **config.trainer)
        for name, config in found.items()
        if "ppo" in name
    }
    return found | trainers


def test_the_papers_profile_leaves_no_hyperparameter_to_a_default():
    from dataclasses import fields

    from fgalign.methods.ppo import SET_BY_RUN
    from fgalign.ppo_trainer import FineGrainedPPOConfig

    trainer = {field.name for field in fields(FineGrainedPPOConfig)} - set(SET_BY_RUN)
    files = {"repo", "revision", "local", "sha256", "rows"}
    server = {"base_url", "key_variable", "max_tokens_name", "parallel", "requests_per_minute", "tokens_per_minute"}
    server |= {"retries", "timeout", "cache", "price_input", "price_output"}
    elsewhere = {"source": files, "annotator": server, "judge_options": server}
    for name, config in paper_sections(load_profile("paper", ROOT).params).items():
        if name.endswith(".trainer"):
            continue
        assert set(type(config).model_fields) - config.model_fields_set == elsewhere.get(name, set()), name
        for key in ("optim", "filter", "curve"):
            inner = getattr(config, key, None)
            assert inner is None or set(type(inner).model_fields) == inner.model_fields_set, f"{name}.{key}"
        if "ppo" in name:
            assert set(config.trainer) == trainer, name


def test_what_the_papers_profile_writes_out_changes_nothing():
    params = load_profile("paper", ROOT).params
    fewer = copy.deepcopy(params)
    methods, judge = fewer["methods"], fewer["judge_models"]["preferences"]
    ppo = [methods[name] for name in ("ppo_preference", "ppo_edit", "ppo_token")]
    rewards = [fewer[name] for name in ("rm_preference", "rm_edit", "rm_token")]
    places = {
        "optim": [section["optim"] for section in (fewer["sft"], *rewards, methods["figa"], judge)],
        "figa": [methods["figa"]],
        "ppo": ppo,
        "trainer": [section["trainer"] for section in ppo],
        "evaluation": [fewer["evaluation"]],
        "judge_options": [fewer["evaluation"]["judge_options"]],
        "annotator": [fewer["annotator"]],
        "judge": [judge],
        "rm_token": [fewer["rm_token"]],
        "source": [fewer["source"]],
    }
    assert set(places) == set(AT_THE_DEFAULT)
    for kind, sections in places.items():
        # Sections that share an anchor are one object.
        for section in {id(section): section for section in sections}.values():
            for key in AT_THE_DEFAULT[kind].split():
                del section[key]

    def parsed(params):
        # These mappings hold what is written; what it means stands beside them, parsed.
        return {
            name: config.model_copy(update={key: None for key in ("trainer", "judge_options") if hasattr(config, key)})
            if isinstance(config, Section)
            else config
            for name, config in paper_sections(params).items()
        }

    assert parsed(fewer) == parsed(params)
