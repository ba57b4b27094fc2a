"""Settings: the same values from options, YAML and mappings; errors name the nearest."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from jsonargparse.typing import PositiveInt

from common import command
from common.errors import UsageError
from common.options import Parser, settings_parser
from common.settings import flat, from_mapping, parse, read_yaml, to_yaml, unflat
from common.units import Names, Seconds, Size
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.finetune import SHORT
from ssl_core.training.central import CentralSettings
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.wav2vec2.config import preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested settings, of which one has no default of its own."""

    learning_rate: float
    """How fast."""
    layers: tuple[int, ...] = (1, 2)
    norm: Literal["batch", "layer"] = "layer"
    keep_freed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """Settings of every type."""

    count: int = 3
    """How many, as `--help` says."""
    batch: PositiveInt | None = None
    name: str = "fine"
    folder: Path | None = None
    length: Seconds = Seconds(5)
    time_limit: Seconds | None = None
    cache: Size = Size(2**30)
    subset: Names = Names()
    lengths: tuple[Seconds, ...] = (Seconds(1),)
    verbose: bool = False
    recipe: Inner = Inner(learning_rate=0.5)

    SHORT: ClassVar[dict[str, str]] = {"rate": "recipe.learning_rate"}

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Another recipe for the name `fast`."""
        if given.get("name") != "fast":
            return {}
        return {"recipe": Inner(learning_rate=9.0, layers=(7,), keep_freed=True)}

    def validate(self) -> None:
        """Check values."""
        if self.count < 0:
            raise UsageError(f"count must not be below zero, not {self.count}")


def outer(*words: str) -> Outer:
    return parse(
        Outer, settings_parser(Outer, prog="outer", short={"--quick": "--name=fast"}), words
    )[0]


def central(*words: str) -> CentralSettings:
    return parse(CentralSettings, settings_parser(CentralSettings, prog="train"), words)[0]


def finetune(*words: str) -> FinetuneSettings:
    parser = settings_parser(FinetuneSettings, prog="finetune", short=SHORT)
    return parse(FinetuneSettings, parser, ["--checkpoint", "random", *words])[0]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command with `Outer` says before it exits with 2."""

    def main(_: Sequence[str] | None) -> None:
        outer(*words)

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.run(main)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def test_without_words_every_value_is_the_default() -> None:
    assert outer() == Outer()
    assert from_mapping(Outer, {}, "here") == Outer()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cuont", "1"), "'cuont'; did you mean 'count'?"),
        (("--time-limt", "1s"), "'time-limt'; did you mean 'time-limit'?"),
        (("--time_limt", "1s"), "did you mean 'time-limit'?"),
        (("--recipe.learning-rat", "1"), "did you mean 'recipe.learning-rate'?"),
        (("--recipe.keep-fred",), "did you mean 'recipe.keep-freed'?"),
        (("--quik",), "did you mean 'quick'?"),
        (("--rat", "1"), "did you mean 'rate'?"),
        (("--con", "1"), "unknown setting 'con'; did you mean 'config'?"),
        (("--verbos",), "unknown setting 'verbos'; did you mean 'verbose'?"),
        (("--xyzzy", "1"), "unknown setting 'xyzzy' (see outer --help)"),
        (("stray",), "unrecognized arguments: stray"),
        (
            ("--recipe.norm", "lyer"),
            "--recipe.norm: 'lyer' is not one of batch, layer; did you mean",
        ),
        (("--count", "x"), "--count: 'x' is not a whole number"),
        (("--count", "1.5"), "--count: '1.5' is not a whole number"),
        (("--count", "-1"), "count must not be below zero, not -1"),
        (("--count",), "--count: expected one argument"),
        (("--batch", "0"), "--batch: 0 is not above zero"),
        (("--batch", "x"), "--batch: 'x' is not a whole number"),
        (("--recipe.learning-rate", "fast"), "--recipe.learning-rate: 'fast' is not a number"),
        (("--recipe.layers", "1", "x"), "--recipe.layers: 'x' is not a whole number"),
        (("--recipe.keep-freed", "maybe"), "--recipe.keep-freed: 'maybe' is not true or false"),
        (("--verbose", "1s"), "--verbose: '1s' is not true or false"),
        (("--length", "long"), "--length: 'long' is not a length: write seconds, as in 5s"),
        (("--time-limit", "long"), "--time-limit: 'long' is not a length: write seconds, as in 5s"),
        (("--lengths", "1s", "long"), "--lengths: 'long' is not a length"),
        (("--length", "0s"), "--length: a length of '0s' holds no audio"),
        (("--cache", "lots"), "--cache: 'lots' is not a size: write bytes, as in 8GB or 512MiB"),
        (("--subset",), "--subset: expected one argument"),
        (("--lengths",), "--lengths: expected one argument"),
        (("--config", "nowhere.yaml"), "cannot read nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *words)


def test_names_are_written_with_dashes_and_nested_ones_with_dots() -> None:
    found = outer("--time-limit", "2min", "--recipe.learning-rate=1e-3", "--recipe.norm", "batch")
    assert found == Outer(time_limit=Seconds(120), recipe=Inner(learning_rate=1e-3, norm="batch"))
    assert outer("--time_limit", "2min", "--recipe.learning_rate", "1e-3").time_limit == 120.0


def test_help_shows_options_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        outer("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--time-limit", "--recipe.learning-rate", "--config", "--print_config"):
        assert option in shown
    assert "--time_limit" not in shown
    assert "How many, as `--help` says." in shown


def test_short_options_stand_for_nested_ones_and_for_values() -> None:
    assert outer("--rate", "2").recipe == Inner(learning_rate=2.0)
    assert outer("--rate=2", "--recipe.learning-rate", "3").recipe.learning_rate == 3.0
    assert outer("--quick").name == "fast"
    assert from_mapping(Outer, {"rate": 2}, "here").recipe.learning_rate == 2.0
    both = {"rate": 2, "recipe": {"learning-rate": 3, "norm": "batch"}}
    assert from_mapping(Outer, both, "here").recipe == Inner(learning_rate=3.0, norm="batch")
    assert finetune(
        "--task", "kws12", "--batch", "3", "--epochs", "2"
    ).recipe == dataclasses.replace(recipe_of("kws12"), batch=3, epochs=2)
    assert finetune("--task", "kws12", "--unfrozen").backbone == "unfrozen"
    assert finetune("--task", "kws12", "--unfrozen", "--frozen").backbone == "frozen"


def test_a_bool_needs_no_value() -> None:
    assert outer("--verbose").verbose
    assert outer("--verbose", "--count", "4") == Outer(verbose=True, count=4)
    assert outer("--recipe.keep-freed", "--verbose").recipe.keep_freed
    assert outer("--verbose", "true", "--count", "4") == Outer(verbose=True, count=4)
    assert outer("--verbose=true").verbose
    assert not outer("--verbose", "false").verbose
    assert not outer("--quick", "--recipe.keep-freed=false").recipe.keep_freed


def test_a_tuple_and_names_take_several_words() -> None:
    assert outer("--lengths", "1s", "2.5s", "1min").lengths == (1.0, 2.5, 60.0)
    assert all(type(each) is Seconds for each in outer("--lengths", "1s", "2.5s").lengths)
    assert outer("--lengths", "2s").lengths == outer("--lengths=2s").lengths == (2.0,)
    assert outer("--recipe.layers", "4", "5", "--count", "1").recipe.layers == (4, 5)
    assert outer("--recipe.layers", "[4, 5]").recipe.layers == (4, 5)
    for words in (("a", "b"), ("a,b",), ("a,", "b")):
        assert outer("--subset", *words, "--count", "1") == Outer(count=1, subset=Names(("a", "b")))
    assert outer("--subset=a,b").subset == ("a", "b")
    assert outer("--subset", "").subset == Names()
    assert finetune("--task", "asr", "--valid", "").valid == Names()


def test_types_are_those_of_the_fields() -> None:
    found = outer(
        *("--length", "1.5min", "--cache", "1.5GiB", "--subset", "a", "--folder", "here"),
        *("--batch", "2", "--name", "5"),
    )
    assert (type(found.length), str(found.length)) == (Seconds, "90s")
    assert (type(found.cache), str(found.cache)) == (Size, "1536MiB")
    assert (type(found.subset), str(found.subset)) == (Names, "a")
    assert (found.folder, found.batch, found.name) == (Path("here"), 2, "5")
    assert outer("--length", "7").length == 7.0
    assert outer("--cache", "0").cache == 0
    given = {
        "length": 7,
        "cache": 2048,
        "subset": ["a", "b"],
        "folder": "here",
        "lengths": [1, "2s"],
    }
    assert from_mapping(Outer, given, "here") == Outer(
        length=Seconds(7),
        cache=Size(2048),
        subset=Names(("a", "b")),
        folder=Path("here"),
        lengths=(Seconds(1), Seconds(2)),
    )


@pytest.mark.parametrize(
    ("kind", "text", "value", "written"),
    [
        (Seconds, "500ms", 0.5, "0.5s"),
        (Seconds, "15.8s", 15.8, "15.8s"),
        (Seconds, "2h", 7200.0, "7200s"),
        (Size, "8GB", 8 * 10**9, "7812500KiB"),
        (Size, "512MiB", 2**29, "512MiB"),
        (Size, "1.5G", 3 * 2**29, "1536MiB"),
        (Size, "1000", 1000, "1000"),
        (Size, "0", 0, "0"),
        (Names, " b, a,,", ("b", "a"), "b,a"),
        (Names, "", (), ""),
        (Names, ["a", "b"], ("a", "b"), "a,b"),
    ],
)
def test_lengths_sizes_and_names_are_read_and_written(
    kind: type[Seconds | Size | Names], text: Any, value: object, written: str
) -> None:
    found = kind.parse(text)
    assert type(found) is kind
    assert found == value
    assert str(found) == written
    assert kind.parse(written) == found


@pytest.mark.parametrize("text", ["", "5 parsecs", "-1s", "0", "1e400s"])
def test_what_is_no_length_or_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a length|holds no audio"):
        Seconds.parse(text)
    if text != "0":
        with pytest.raises(UsageError, match="is not a size"):
            Size.parse(text)
    with pytest.raises(UsageError, match="is empty: it must be above zero"):
        Size.parse("0GB")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 1}, "here: unknown setting 'cuont'; did you mean 'count'?"),
        ({"recipe": {"learnin_rate": 1}}, "did you mean 'recipe.learning-rate'?"),
        ({"recipe": {"norm": "lyer"}}, "'lyer' is not one of batch, layer; did you mean 'layer'?"),
        ({"recipe": 3}, "here: recipe must be a mapping of settings"),
        ({"recipe": None}, "here: recipe must be a mapping of settings"),
        ({"recipe": {"learning-rate": None}}, "here: recipe.learning-rate: a value is missing"),
        ({"length": None}, "here: length: a value is missing"),
        ({"subset": None}, "here: subset: a value is missing"),
        ({"time-limit": "long"}, "time-limit: 'long' is not a length"),
        ({"batch": 0}, "batch: 0 is not above zero"),
        ({"count": "x"}, "count: 'x' is not a whole number"),
        ({"count": 1.5}, "count: '1.5' is not a whole number"),
        ({"count": True}, "count: 'True' is not a whole number"),
        ({"lengths": 3}, "lengths: '3' is not a list"),
        ({"verbose": 1}, "verbose: '1' is not true or false"),
        ({"count": -1}, "here: count must not be below zero, not -1"),
        ({1: 2}, "here: unknown setting '1'"),
    ],
)
def test_wrong_mappings_are_refused(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_mapping(Outer, values, "here")
    assert message in str(caught.value)
    assert str(caught.value).startswith("here: ")


def test_keys_of_a_mapping_have_dashes_or_underscores() -> None:
    expected = Outer(time_limit=Seconds(1), recipe=Inner(learning_rate=2.0, keep_freed=True))
    for line in ("-", "_"):
        recipe = {f"learning{line}rate": 2, f"keep{line}freed": True}
        given = {f"time{line}limit": "1s", "recipe": recipe}
        assert from_mapping(Outer, given, "here") == expected
        assert given == {f"time{line}limit": "1s", "recipe": recipe}


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in (
        ("- a\n", "must be 'name: value' lines, not a list"),
        ("a: [\n", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path)


FULL = Outer(
    count=0,
    batch=PositiveInt(2),
    name="other",
    folder=Path("a b/c"),
    length=Seconds(0.5),
    time_limit=Seconds(90),
    cache=Size(0),
    subset=Names(("a", "b")),
    lengths=(Seconds(1), Seconds(2.5)),
    verbose=True,
    recipe=Inner(learning_rate=1e-5, layers=(4,), norm="batch", keep_freed=True),
)


def test_flat_settings_are_scalars_by_dotted_name() -> None:
    found = flat(FULL)
    assert found["recipe.learning-rate"] == 1e-5
    assert found["recipe.keep-freed"] is True
    assert (found["length"], found["cache"], found["subset"]) == ("0.5s", "0", "a,b")
    assert (flat(Outer())["folder"], flat(Outer())["time-limit"]) == ("", "")
    assert all(type(value) in (str, int, float, bool) for value in found.values())
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("settings", [Outer(), FULL], ids=["default", "full"])
def test_flat_and_unflat_are_each_others_inverse(settings: Outer) -> None:
    nested = unflat(flat(settings))
    assert from_mapping(Outer, nested, "run config") == settings
    assert nested["recipe"].keys() == {"learning-rate", "layers", "norm", "keep-freed"}
    assert ("time-limit" in nested) == (settings.time_limit is not None)


def test_an_empty_text_of_unflat_is_not_given() -> None:
    assert unflat({"a": "", "b.c": 0, "b.d-e": "", "f": False}) == {"b": {"c": 0}, "f": False}
    fast = {"name": "fast", "recipe.learning-rate": "", "recipe.norm": "batch", "length": ""}
    assert from_mapping(Outer, unflat(fast), "run config") == Outer(
        name="fast", recipe=Inner(learning_rate=9.0, layers=(7,), norm="batch", keep_freed=True)
    )


@pytest.mark.parametrize("settings", [Outer(), FULL], ids=["default", "full"])
def test_yaml_gives_the_settings_back(settings: Outer) -> None:
    text = to_yaml(settings)
    assert "time-limit:" in text
    assert "  learning-rate:" in text
    assert "_" not in text
    assert from_mapping(Outer, yaml.safe_load(text), "here") == settings


def test_yaml_of_a_centralised_run_gives_it_back() -> None:
    for settings in (
        CentralSettings(),
        central("--model", "tiny", "--subset", "a", "b", "--length", "1.5s", "--data", "x y"),
        central("--plan.recompute-layers", "--plan.optimizer-state", "int8", "--seed", "3"),
        central("--model", "tiny", "--architecture.layerdrop", "0.2", "--recipe.clip-norm", "1"),
    ):
        loaded = yaml.safe_load(settings.as_config())
        assert from_mapping(CentralSettings, loaded, "here") == settings
        assert from_mapping(CentralSettings, unflat(flat(settings)), "here") == settings


def test_yaml_of_fine_tuning_gives_it_back() -> None:
    for settings in (
        finetune("--task", "kws12"),
        finetune("--task", "emotion", "--fold", "all", "--unfrozen", "--score-train"),
        finetune("--task", "asr", "--beam", "5", "--words", "w", "--valid", "", "--cache", "0"),
        finetune("--task", "asr", "--train", "a", "b", "--recipe.head", "linear-ctc"),
    ):
        loaded = yaml.safe_load(settings.as_config())
        assert from_mapping(FinetuneSettings, loaded, "here") == settings
    # An empty text is a setting that was not given, so `valid` without subsets is not flat.
    flattened = finetune("--task", "emotion", "--fold", "all", "--batch", "3")
    assert from_mapping(FinetuneSettings, unflat(flat(flattened)), "here") == flattened


@pytest.mark.parametrize("name", ["base", "tiny"])
def test_architecture_and_recipe_are_the_presets(name: str) -> None:
    found = central("--model", name)
    assert (found.architecture, found.recipe) == (preset(name), RECIPES[name])
    assert from_mapping(CentralSettings, {"model": name}, "here") == found
    with pytest.raises(UsageError, match=r"no model 'tinny'.*did you mean 'tiny'"):
        central("--model", "tinny")


@pytest.mark.parametrize("task", ["kws12", "asr", "verification"])
def test_the_recipe_is_the_tasks(task: str) -> None:
    assert finetune("--task", task).recipe == recipe_of(task)
    given = {"task": task, "checkpoint": "random"}
    assert from_mapping(FinetuneSettings, given, "here") == finetune("--task", task)


def test_without_a_task_it_is_asked_for() -> None:
    with pytest.raises(UsageError, match="--task: say which"):
        finetune()
    with pytest.raises(UsageError, match=r"no task 'kws'.*did you mean 'kws"):
        finetune("--task", "kws")


def test_a_value_that_was_not_given_never_overrides_a_recipe(tmp_path: Path) -> None:
    tiny = RECIPES["tiny"]
    assert tiny.learning_rate != Recipe().learning_rate
    some = central("--model", "tiny", "--recipe.warmup", "0.2", "--seed", "1")
    assert some.recipe == dataclasses.replace(tiny, warmup=0.2)
    # A value that is given is taken, also where it is the default of the class.
    usual = Recipe().learning_rate
    given = central("--model", "tiny", "--recipe.learning-rate", str(usual))
    assert given.recipe == dataclasses.replace(tiny, learning_rate=usual)
    mapping = {"model": "tiny", "recipe": {"learning-rate": usual}, "length": "5s"}
    assert from_mapping(CentralSettings, mapping, "here").recipe == given.recipe
    emotion = recipe_of("emotion")
    found = finetune("--task", "emotion", "--seed", "1", "--batch", "7")
    assert found.recipe == dataclasses.replace(emotion, batch=7)
    path = tmp_path / "recipe.yaml"
    path.write_text("head-rate: 5e-3\nbatch: 9\n")
    of_file = dataclasses.replace(emotion, head_rate=5e-3, batch=9)
    assert finetune("--task", "emotion", "--recipe", str(path)).recipe == of_file
    changed = finetune("--task", "emotion", "--recipe", str(path), "--batch", "2")
    assert changed.recipe == dataclasses.replace(of_file, batch=2)


def test_a_file_of_settings_is_below_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "count: 8\nname: fast\nverbose: true\nsubset: [a, b]\nlengths: [1s, 2s]\n"
        "recipe:\n  norm: batch\n  keep-freed: false\n"
    )
    listed = Outer(
        count=8,
        name="fast",
        verbose=True,
        subset=Names(("a", "b")),
        lengths=(Seconds(1), Seconds(2)),
        recipe=Inner(learning_rate=9.0, layers=(7,), norm="batch"),
    )
    assert outer("--config", str(path)) == listed
    options = ("--count", "2", "--recipe.norm", "layer", "--lengths", "4s", "--verbose=false")
    expected = dataclasses.replace(
        listed,
        count=2,
        verbose=False,
        lengths=(Seconds(4),),
        recipe=Inner(learning_rate=9.0, layers=(7,)),
    )
    assert outer("--config", str(path), *options) == expected
    assert outer(*options, "--config", str(path)) == expected
    slow = outer("--config", str(path), "--name", "slow")
    assert slow.recipe == Inner(learning_rate=0.5, norm="batch")
    path.write_text("rate: 4\n")
    assert outer("--config", str(path)).recipe == Inner(learning_rate=4.0)
    for text, message in (
        ("cuont: 1\n", f"{path}: unknown setting 'cuont'; did you mean 'count'?"),
        ("recipe:\n  nrm: layer\n", "did you mean 'recipe.norm'?"),
        ("recipe: 3\n", f"{path}: recipe must be a mapping of settings"),
        ("count: x\n", "count: 'x' is not a whole number"),
        ("- count\n", f"{path}: settings must be 'name: value' lines, not a list"),
        ("count: [\n", f"{path} is not YAML"),
    ):
        path.write_text(text)
        assert message in refused(capsys, "--config", str(path))


def test_a_printed_config_is_all_settings_and_gives_them_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--quick", "--count", "4", "--recipe.norm", "batch")
    with pytest.raises(SystemExit) as stopped:
        outer(*words, "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(outer(*words))
    path = tmp_path / "c.yaml"
    path.write_text(printed)
    assert outer("--config", str(path)) == outer(*words)
    with pytest.raises(SystemExit):
        finetune("--task", "emotion", "--print_config")
    path.write_text(capsys.readouterr().out)
    assert finetune("--config", str(path)) == finetune("--task", "emotion")


def test_further_options_are_apart_and_there_only_if_given() -> None:
    parser = settings_parser(Outer, prog="outer")
    parser.add_argument("--workers", type=int, default=0)
    settings, others = parse(Outer, parser, ["--workers", "2", "--count", "1"])
    assert (settings, others) == (Outer(count=1), {"workers": 2})
    assert parse(Outer, parser, []) == (Outer(), {})


def test_a_parser_is_used_again_without_what_was_given_before() -> None:
    parser = settings_parser(CentralSettings, prog="train")
    first, _ = parse(CentralSettings, parser, ["--model", "tiny", "--seed", "3"])
    second, _ = parse(CentralSettings, parser, [])
    assert first.architecture == preset("tiny")
    assert second == CentralSettings()


def test_a_command_without_settings_names_the_nearest_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = Parser(prog="demo")
    parser.add_argument("--folder")
    assert parser.parse_args(["--folder", "x"]).folder == "x"
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--foldr", "x"])
    assert stopped.value.code == 2
    assert "demo: error: unknown setting 'foldr'; did you mean 'folder'?" in capsys.readouterr().err
