"""Settings: flags, files, jobs files, and Axolotl's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loriner.config import KEY_ENV
from loriner.errors import CheckpointError, ConfigError, DataError
from loriner.train.files import load_settings
from loriner.train.prepare import prepare
from loriner.train.settings import ALL_LINEAR, JobConfig, PromoteConfig, PublishConfig
from tests.train.conftest import WriteRows, chat

AXOLOTL = """
base_model: models/smollm2-nf4
load_in_4bit: true
adapter: qlora
datasets:
  - path: train.jsonl
    type: chat_template
val_set_size: 0.1
output_dir: ./outputs/My-Pirate
sequence_len: 512
sample_packing: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
warmup_steps: 10
bf16: auto
tf32: false
flash_attention: true
gradient_checkpointing: true
logging_steps: 1
weight_decay: 0.0
wandb_project:
dataset_prepared_path: last_run_prepared
evals_per_epoch: 4
saves_per_epoch: 1
eval_sample_packing: true
special_tokens:
  pad_token: "<|end_of_text|>"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_that_over_the_default(tmp_path: Path) -> None:
    for suffix, text in ((".toml", 'name="a"\ndata="d.jsonl"\nrank=4\nalpha=8\n'),) * 1 + (
        (".yaml", "name: a\ndata: d.jsonl\nrank: 4\nalpha: 8\n"),
    ):
        path = write(tmp_path / f"run{suffix}", text)
        (job,) = load_settings({"rank": "2"}, path).jobs

        assert (job.rank, job.alpha, job.dropout) == (2, 8.0, 0.0)


PAIRS = [
    ("evals_per_epoch", 2, "eval_every", "3"),
    ("eval_every", 2, "evals_per_epoch", "3"),
    ("saves_per_epoch", 2, "save_every", "3"),
    ("eval_split", 0.5, "eval_data", "held.jsonl"),
    ("eval_data", "held.jsonl", "eval_split", "0.5"),
]


@pytest.mark.parametrize(("in_file", "value", "flag", "given"), PAIRS)
def test_a_flag_takes_the_place_of_what_it_excludes_in_the_file(
    in_file: str, value: object, flag: str, given: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "run.yaml", f"name: a\ndata: d\n{in_file}: {value}\n")
    (job,) = load_settings({flag: given}, path).jobs

    assert str(getattr(job, flag)) == given
    assert not getattr(job, in_file)
    (job,) = load_settings({flag: None}, path).jobs
    assert getattr(job, in_file)


@pytest.mark.parametrize(("one", "value", "other", "given"), PAIRS)
def test_two_of_one_source_exclude_each_other(
    one: str, value: object, other: str, given: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "run.yaml", f"name: a\ndata: d\n{one}: {value}\n{other}: {given}\n")
    with pytest.raises(ConfigError, match="exclude each other"):
        load_settings({}, path)
    with pytest.raises(ConfigError, match="exclude each other"):
        load_settings({"name": "a", "data": "d", one: str(value), other: given})


def test_the_environment_takes_the_place_of_what_it_excludes_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "run.yaml", "name: a\ndata: d\nevals_per_epoch: 2\n")
    monkeypatch.setenv("LORINER_EVAL_EVERY", "3")
    (job,) = load_settings({}, path).jobs
    assert (job.eval_every, job.evals_per_epoch) == (3, 0)
    (job,) = load_settings({"evals_per_epoch": "4"}, path).jobs
    assert (job.eval_every, job.evals_per_epoch) == (0, 4)


def test_a_job_takes_the_place_of_what_it_excludes_at_the_top(tmp_path: Path) -> None:
    path = write(
        tmp_path / "jobs.toml",
        'evals_per_epoch = 2\n[[jobs]]\nname="a"\ndata="d"\neval_every=3\n'
        '[[jobs]]\nname="b"\ndata="d"\n',
    )
    jobs = load_settings({}, jobs=path).jobs

    assert [(job.eval_every, job.evals_per_epoch) for job in jobs] == [(3, 0), (0, 2)]


def test_where_adapters_are_published_may_stand_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEY_ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORINER_STORE", "of-the-server")
    path = write(
        tmp_path / "run.toml",
        'name = "acme/a"\ndata = "d"\neval_split = 0.5\npublish = "http://127.0.0.1:1"\n'
        'key = "k"\npromote = "prod"\ncanary_tolerance = 0.2\n',
    )
    settings = load_settings({}, path)
    assert settings.publish == PublishConfig("http://127.0.0.1:1", None, "k")
    assert settings.promote == (PromoteConfig("prod", 0.2),)
    assert str(settings.promote[0].alias("acme/a")) == "acme/prod"

    settings = load_settings({"store": "s", "promote": "", "canary_tolerance": "0.1"}, path)
    assert settings.publish == PublishConfig("", Path("s"), "k")
    assert settings.promote == (PromoteConfig("", 0.1),)
    monkeypatch.setenv("LORINER_API_KEY", "user")
    assert load_settings({}, path).publish.key == "user"
    monkeypatch.setenv("LORINER_ADMIN_KEY", "boss")
    assert load_settings({}, path).publish.key == "boss"
    assert load_settings({"key": "flag"}, path).publish.key == "flag"


def test_each_job_may_have_an_alias_and_all_go_to_one_place(tmp_path: Path) -> None:
    text = (
        'store = "s"\neval_split = 0.5\ncanary_tolerance = 0.3\n'
        '[[jobs]]\nname = "a"\ndata = "d"\npromote = "prod"\n'
        '[[jobs]]\nname = "b"\ndata = "d"\npromote = "{}"\ncanary_tolerance = 0.1\n'
    )
    path = write(tmp_path / "jobs.toml", text.format("next"))
    settings = load_settings({}, jobs=path)
    assert settings.publish.store == Path("s")
    assert settings.promote == (PromoteConfig("prod", 0.3), PromoteConfig("next", 0.1))

    with pytest.raises(ConfigError, match="two jobs would promote default/prod"):
        load_settings({}, jobs=write(path, text.format("default/prod")))
    with pytest.raises(ConfigError, match="two jobs would promote default/all"):
        load_settings({"promote": "all"}, jobs=path)
    with pytest.raises(ConfigError, match=r"cannot honour jobs\.store"):
        load_settings({}, jobs=write(path, text.format("next") + 'store = "t"\n'))


def test_a_list_may_be_written_as_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml", "name: a\ndata: d\ntarget_modules: [v_proj, q_proj]\npacking: true\n"
    )
    (job,) = load_settings({}, path).jobs

    assert job.targets() == ("q_proj", "v_proj")
    assert job.packing


def test_jobs_share_the_top_of_their_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "jobs.toml",
        'base = "b"\nrank = 4\n[[jobs]]\nname = "a"\ndata = "a.jsonl"\n'
        '[[jobs]]\nname = "t/b"\ndata = "b.jsonl"\nrank = 8\n',
    )
    settings = load_settings({}, jobs=path)

    assert settings.run.base == Path("b")
    assert [(job.name, job.rank) for job in settings.jobs] == [("a", 4), ("t/b", 8)]
    assert settings.jobs[1].folder == Path("runs/t--b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 'a'", "cannot honour nam"),
        ("[[jobs]]\nname='a'\ndata='d'\ndevice='cpu'", r"cannot honour jobs.device"),
        ("[[jobs]]\nname='a'\ndata='d'\n" * 2, "two jobs have the name a"),
        ("jobs = 3", r"needs a \[\[jobs\]\] table"),
        ("= 3", "Invalid"),
        ("name='a'\ndata='d'\nresume=true", "cannot honour resume"),
        ("name='a'\ndata='d'\npromote='p'", "promote needs publish or store"),
        ("name='a'\ndata='d'\nstore='s'\npublish='http://x'", "publish and store exclude"),
        ("name='a'\ndata='d'\nstore='s'\npromote='p'", "promote needs eval_data or eval_split"),
        ("name='a'\ndata='d'\nstore='s'\ncanaries=0", "canaries of at least 1 for a"),
        ("name='a'\ndata='d'\nstore='s'\npromote='A b'", "promote: "),
    ],
)
def test_a_wrong_file_is_refused_by_key(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "jobs.toml", text)
    with pytest.raises(ConfigError, match=message):
        load_settings({}, **{"jobs" if "jobs" in text else "config": path})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is missing"),
        ({"name": "Bad Name"}, "name: "),
        ({"data": None}, "data is missing"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 257}, "rank must be at most 256"),
        ({"schedule": "square"}, "schedule must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw_8bit"),
        ({"target_modules": "lm_head"}, "target_modules: 'lm_head' is not one of all-linear"),
        ({"eval_data": "e", "eval_split": 0.1}, "exclude each other"),
        ({"early_stopping": 3}, "early_stopping needs eval_data"),
        ({"eval_every": 3, "evals_per_epoch": 2}, "eval_every and evals_per_epoch exclude"),
    ],
)
def test_each_setting_has_its_limits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JobConfig(**{"name": "a", "data": Path("d"), **changes})


def test_axolotl_qlora_yaml_is_taken_as_it_is(tmp_path: Path) -> None:
    settings = load_settings({}, write(tmp_path / "qlora.yml", AXOLOTL))
    (job,) = settings.jobs

    assert settings.run.base == Path("models/smollm2-nf4")
    assert settings.run.gradient_checkpointing
    assert (job.name, job.data, job.out) == (
        "my-pirate",
        Path("train.jsonl"),
        Path("outputs/My-Pirate"),
    )
    assert (job.rank, job.alpha, job.dropout, job.targets()) == (8, 16.0, 0.05, ALL_LINEAR)
    assert (job.max_length, job.packing, job.batch, job.accumulation) == (512, True, 4, 2)
    assert (job.epochs, job.schedule, job.warmup, job.eval_split) == (3.0, "cosine", 10.0, 0.1)
    assert (job.optimizer, job.learning_rate) == ("paged_adamw_8bit", 2e-4)
    assert (job.evals_per_epoch, job.saves_per_epoch) == (4, 1)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("deepspeed: zero3.json", "deepspeed"),
        ("lora_modules_to_save: [embed_tokens]", "lora_modules_to_save"),
        ("adapter: lora", "adapter: lora"),
        ("attn_implementation: sage", "attn_implementation: sage"),
        ("optimizer: lion_8bit", "optimizer: lion_8bit"),
        ("optimizer: adafactor", "optimizer: adafactor"),
        ("optimizer: adamw_torch_8bit", "optimizer: adamw_torch_8bit"),  # torchao's: other blocks
        ("optimizer: adamw_hf", "optimizer: adamw_hf"),  # another place for epsilon
        ("trust_remote_code: true", "trust_remote_code: True"),
        ("tokenizer_type: GemmaTokenizer", "tokenizer_type: GemmaTokenizer"),
        ("eval_table_size: 5", "eval_table_size"),
        ("val_set_size: 100", "val_set_size: 100"),
        ("loss_watchdog_threshold: 5.0", "loss_watchdog_threshold"),
        ("special_tokens: {eos_token: x}", "special_tokens.eos_token"),
        ("train_on_inputs: true", "train_on_inputs: True"),
        ("datasets: [{path: a.jsonl, type: alpaca, shards: 3}]", "datasets.shards"),
    ],
)
def test_an_axolotl_key_that_cannot_be_honoured_is_named(
    line: str, named: str, tmp_path: Path
) -> None:
    kept = [row for row in AXOLOTL.splitlines() if row.split(":")[0] != line.split(":")[0]]
    if line.startswith(("datasets", "special_tokens")):
        nested = ("  - path", "    type") if line.startswith("datasets") else ("  pad_token",)
        kept = [row for row in kept if not row.startswith(nested)]
    path = write(tmp_path / "qlora.yml", "\n".join([*kept, line]))

    with pytest.raises(ConfigError, match=rf"cannot honour .*{named}"):
        load_settings({}, path)
    assert named in load_settings({}, path, ignore_unknown=True).ignored


@pytest.mark.parametrize("line", ["", "adapter:\n"])
def test_an_axolotl_file_without_an_adapter_asks_for_what_is_not_done(
    line: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "full.yml", AXOLOTL.replace("adapter: qlora\n", line))

    with pytest.raises(ConfigError, match="cannot honour a missing `adapter`"):
        load_settings({}, path)
    (ignored,) = load_settings({}, path, ignore_unknown=True).ignored
    assert "all weights" in ignored


@pytest.mark.parametrize("ratio", ["0.1", "0"])
def test_two_axolotl_keys_for_one_setting_are_refused(ratio: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qlora.yml", f"{AXOLOTL}warmup_ratio: {ratio}\n")

    with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio exclude each other"):
        load_settings({}, path)
    write(path, f"{AXOLOTL}warmup_ratio:\n")
    assert load_settings({}, path).jobs[0].warmup == 10


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_8bit", "adamw_8bit"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw_32bit"),
    ],
)
def test_axolotl_names_of_optimisers_are_ours_of_the_same_maths(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    text = AXOLOTL.replace("optimizer: paged_adamw_8bit", f"optimizer: {theirs}")

    assert load_settings({}, write(tmp_path / "qlora.yml", text)).jobs[0].optimizer == ours


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer_type: LlamaTokenizer",
        "model_type: LlamaForCausalLM",
        "is_llama_derived_model: true",
        "is_mistral_derived_model: true",
        "xformers_attention: true",
        "eval_table_max_new_tokens: 128",
        "eval_max_new_tokens: 128",
        "eval_table_size:",
        "use_wandb: false",
        "lora_fan_in_fan_out:",
        "lora_model_dir:",
        "pad_to_sequence_len: true",
        "fsdp_config:",
    ],
)
def test_an_axolotl_key_that_changes_nothing_here_is_taken(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qlora.yml", f"{AXOLOTL}{line}\n")

    assert load_settings({}, path) == load_settings({}, write(tmp_path / "plain.yml", AXOLOTL))


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", ""])
def test_an_axolotl_file_may_choose_any_exact_attention(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qlora.yml", f"{AXOLOTL}attn_implementation: {name}\n")

    assert not load_settings({}, path).ignored


@pytest.mark.parametrize(
    ("field", "columns"), [("", "text=text"), ("    field: body\n", "text=body")]
)
def test_axolotl_completion_is_plain_text(field: str, columns: str, tmp_path: Path) -> None:
    text = AXOLOTL.replace("type: chat_template\n", f"type: completion\n{field}")
    path = write(tmp_path / "qlora.yml", text)

    assert load_settings({}, path).jobs[0].columns == columns


def test_axolotl_data_sets_of_different_columns_are_refused(tmp_path: Path) -> None:
    text = AXOLOTL.replace("type: chat_template\n", "type: completion\n    field: a\n")
    text = text.replace("val_set_size: 0.1", "test_datasets: [{path: e.jsonl, field: b}]")

    with pytest.raises(ConfigError, match="test_datasets must have the columns of the other"):
        load_settings({}, write(tmp_path / "qlora.yml", text))


def test_a_name_of_a_hub_is_refused_with_the_flag_that_gives_ones_own(
    tmp_path: Path, tiny: Path, write_rows: WriteRows
) -> None:
    path = write(tmp_path / "qlora.yml", AXOLOTL.replace("models/smollm2-nf4", "meta/llama"))
    rows = str(write_rows([chat("q", str(i)) for i in range(4)]))

    with pytest.raises(CheckpointError, match=r"meta/llama: No such folder.*--base gives a folder"):
        prepare(load_settings({"data": rows}, path))
    with pytest.raises(DataError, match=r"train.jsonl: No such file.* --data gives a file"):
        prepare(load_settings({"base": str(tiny)}, path))
    with pytest.raises(DataError, match=r"org/held: No such file.* --eval-data gives a file"):
        flags = {"base": str(tiny), "data": rows, "eval_data": "org/held", "eval_split": "0"}
        prepare(load_settings(flags, path))
    assert prepare(load_settings({"base": str(tiny), "data": rows}, path)).jobs
