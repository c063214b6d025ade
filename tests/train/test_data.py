"""Data files: shapes, masks, refusals, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loriner.errors import ConfigError, DataError
from loriner.train.data import DataSet, load_data, load_prompts, parse_columns
from loriner.train.masks import Document, Masker
from loriner.train.rows import Chat, Pair, RowError, Text, recognise
from tests.tiny import IM_END, IM_START
from tests.train.conftest import WriteRows, chat


def load(path: Path, masker: Masker, **more: Any) -> DataSet:
    return load_data(path, masker, **{"max_length": 200, **more})


def learnt(document: Document) -> bytes:
    """The learnt bytes of a document; the tiny base's ids are bytes, <|im_end|> is shown as |."""
    pairs = zip(document.token_ids, document.is_learnt, strict=True)
    ids = [token for token, is_learnt in pairs if is_learnt]
    return b"".join(b"|" if token == IM_END else bytes([token]) for token in ids)


def only(path: Path, masker: Masker, **more: Any) -> Document:
    (document,) = load(path, masker, **more).documents
    return document


def test_the_loss_is_on_the_answer_and_its_end_alone(masker: Masker, write_rows: WriteRows) -> None:
    document = only(write_rows([chat("Who?", "Me.")]), masker)

    assert learnt(document) == b"Me.|"
    assert document.token_ids[0] == IM_START
    assert bytes(document.token_ids[-1:]) == b"\n"


def test_every_assistant_turn_is_learnt_unless_its_weight_is_0(
    masker: Masker, write_rows: WriteRows
) -> None:
    row = {
        "messages": [
            *chat("a", "one")["messages"],
            *chat("b", "two", weight=0)["messages"],
            *chat("c", "three")["messages"],
        ]
    }
    document = only(write_rows([row]), masker)

    assert learnt(document) == b"one|three|"
    assert document.token_ids.count(IM_END) == 6


def test_an_empty_answer_may_stand_there_unlearnt(masker: Masker, write_rows: WriteRows) -> None:
    unlearnt = chat("a", "", weight=0)["messages"]
    both = write_rows([{"messages": [*unlearnt, *chat("b", "two")["messages"]]}])

    assert learnt(only(both, masker)) == b"two|"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, b"4|"),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            b"a|",
        ),
        ({"text": "abc"}, b"bc|"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, b"3|"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            b"a|",
        ),
        ({"conversations": [{"role": "user", "content": "q"}] * 1}, None),
    ],
)
def test_shapes_are_known_by_their_keys(
    row: dict[str, Any], expected: bytes | None, masker: Masker, write_rows: WriteRows
) -> None:
    path = write_rows([row])
    if expected is None:
        with pytest.raises(DataError, match="line 1: no assistant turn to learn from"):
            load(path, masker)
    else:
        assert learnt(only(path, masker)) == expected


def test_a_csv_is_read_by_its_header_or_by_named_columns(masker: Masker, tmp_path: Path) -> None:
    plain, named = tmp_path / "plain.csv", tmp_path / "named.csv"
    plain.write_text('prompt,completion\n"a, b",c\n')
    named.write_text("question,answer,id\nq,a,7\n")

    assert learnt(only(plain, masker)) == b"c|"
    columns = parse_columns("prompt=question,completion=answer")
    assert learnt(only(named, masker, columns=columns)) == b"a|"
    with pytest.raises(DataError, match=r"line 2: none of the known shapes has the keys answer"):
        load(named, masker)


def test_a_named_column_that_is_not_there_is_named_with_those_that_are(
    masker: Masker, tmp_path: Path, write_rows: WriteRows
) -> None:
    path = tmp_path / "named.csv"
    path.write_text("question,answer,id\nq,a,7\n")
    columns = parse_columns("prompt=questoin,completion=answer")
    expected = r"named.csv has no column 'questoin' to be 'prompt'; it has question, answer, id\."

    with pytest.raises(DataError, match=expected):
        load(path, masker, columns=columns)
    with pytest.raises(DataError, match=expected):
        load_prompts(path, columns)
    with pytest.raises(DataError, match=r"k0, k1, .*k19 and 5 more\."):
        load(write_rows([{f"k{i}": 1 for i in range(25)}]), masker, columns=columns)


def test_a_named_column_may_be_missing_in_some_rows(masker: Masker, write_rows: WriteRows) -> None:
    row = {"instruction": "a", "output": "b"}
    columns = parse_columns("input=context")

    assert (
        len(load(write_rows([row, {**row, "context": "c"}]), masker, columns=columns).entries) == 2
    )


def test_a_column_named_as_text_is_learnt_whatever_else_a_row_has(
    masker: Masker, write_rows: WriteRows
) -> None:
    columns = parse_columns("text=text")

    both = write_rows([{**chat("q", "a"), "text": "abc"}])
    assert learnt(only(both, masker, columns=columns)) == b"bc|"
    with pytest.raises(DataError, match="has no column 'text' to be 'text'; it has messages"):
        load(write_rows([chat("q", "a")]), masker, columns=columns)


def test_columns_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="KEY=COLUMN"):
        parse_columns("prompt")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "a JSON object is expected"),
        ({"messages": []}, "`messages` must be a list of messages"),
        ({"messages": [{"role": "bird", "content": "x"}]}, r"messages\[0\].role is 'bird'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn to learn from"),
        (chat("q", "a", weight=0), "no assistant turn to learn from"),
        (chat("q", "a", weight=2), r"messages\[1\].weight is 2"),
        (chat("q", "a", tool_calls=[{}]), r"messages\[1\].tool_calls cannot be trained on"),
        ({**chat("q", "a"), "tools": [{"type": "function"}]}, "`tools` cannot be trained on"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty"),
        (chat("q", ""), r"messages\[1\] is an empty answer; with weight 0 it is not learnt"),
        (chat("q", " \n"), r"messages\[1\] is an empty answer"),
        (chat("q", "", tool_calls=[{}]), r"messages\[1\].tool_calls cannot be trained on"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
            r"conversations\[1\] is an empty answer",
        ),
        (
            {"prompt": chat("q", "")["messages"], "completion": chat("q", "")["messages"]},
            r"completion\[1\] is an empty answer",
        ),
        ({"text": ""}, "`text` must be a text that is not empty"),
        ({"instruction": "a", "output": None}, "`output` must be a text"),
        (chat("q" * 300, "a"), "nothing to learn within max_length 200"),
        ({"colour": "red"}, "none of the known shapes has the keys colour"),
    ],
)
def test_a_bad_row_is_reported_with_line_and_reason(
    row: dict[str, Any] | str, reason: str, masker: Masker, write_rows: WriteRows
) -> None:
    path = write_rows([chat("q", "a"), row])

    with pytest.raises(DataError, match=rf"1 of 2 rows are bad[^\n]*\n  line 2: {reason}"):
        load(path, masker)
    data = load(path, masker, max_bad_share=0.5)
    assert len(data.documents) == 1
    assert "1 bad rows left out:\n  line 2" in data.summary()


def test_a_file_of_nothing_but_bad_rows_is_refused_at_any_share(
    masker: Masker, write_rows: WriteRows
) -> None:
    with pytest.raises(DataError, match="1 of 1 rows are bad"):
        load(write_rows(["{"]), masker, max_bad_share=1.0)
    with pytest.raises(DataError, match="has no rows"):
        load(write_rows([]), masker)


def test_a_missing_or_binary_file_is_a_clear_error(masker: Masker, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: No such file"):
        load(tmp_path / "none.jsonl", masker)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        load(tmp_path / "bytes.jsonl", masker)


def test_lengths_and_truncation_are_told(masker: Masker, write_rows: WriteRows) -> None:
    data = load(write_rows([chat("q", "a" * 300), chat("q", "a")]), masker)

    assert "2 rows, 2 documents" in data.summary()
    assert "1 truncated" in data.summary()
    assert [len(document.token_ids) for document in data.documents] == [200, 23]


def test_rows_are_held_out_by_the_seed(masker: Masker, write_rows: WriteRows) -> None:
    data = load(write_rows([chat("q", str(i)) for i in range(20)]), masker)
    train, held = data.split(0.1, seed=1)

    assert (len(train.documents), len(held.documents)) == (18, 2)
    assert data.split(0.1, seed=1)[1].prompts == held.prompts
    assert not {p.answer for p in held.prompts} & {p.answer for p in train.prompts}


def test_each_half_of_a_split_tells_of_its_own_rows(masker: Masker, write_rows: WriteRows) -> None:
    rows: list[Any] = [chat("q", "a" * (300 if i % 2 else 1)) for i in range(20)]
    data = load(write_rows([*rows, "{"]), masker, max_bad_share=0.1)
    train, held = data.split(0.2, seed=1)

    assert "21 rows, 20 documents" in data.summary()
    assert "17 rows, 16 documents" in train.summary()
    assert "4 rows, 4 documents" in held.summary()
    for half in (train, held, held.limited(2)):
        cut = sum(len(document.token_ids) == 200 for document in half.documents)
        assert f"; {cut} truncated" in half.summary()
    assert "line 21" in train.summary()
    assert "bad rows" not in held.summary()
    assert "2 rows, 2 documents" in held.limited(2).summary()


@pytest.mark.parametrize(("count", "longest_of_95"), [(1, 23), (2, 24), (20, 41), (21, 42)])
def test_95_in_100_documents_are_at_most_as_long_as_is_told(
    count: int, longest_of_95: int, masker: Masker, write_rows: WriteRows
) -> None:
    data = load(write_rows([chat("q", "a" * (i + 1)) for i in range(count)]), masker)

    assert f"95 % up to {longest_of_95}, longest {22 + count};" in data.summary()


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each_answer(
    tokenizer: Any,
) -> None:
    class Forgetful:
        """Drops all but the last question, as templates do that hide earlier thoughts."""

        chat_template = "one"
        eos_token_id = IM_END
        encode = staticmethod(tokenizer.encode)

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            last = [m for m in messages if m["role"] == "user"][-1]["content"]
            answer = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
            return f"<{last}>{answer}"

    turns = [*chat("a", "one")["messages"], *chat("b", "two")["messages"]]
    example = recognise({"messages": turns}, {})
    documents = Masker(Forgetful(), [IM_END]).documents(example)

    assert [learnt(document) for document in documents] == [b"one|", b"two|"]


def test_prompts_have_the_tokens_that_the_server_gives_them(masker: Masker, tokenizer: Any) -> None:
    example = recognise(chat("héllo", "a"), {})
    assert isinstance(example, Chat)
    (document,) = masker.documents(example)
    prompt = masker.prompt_ids(example.turns[:1])

    assert list(document.token_ids[: len(prompt)]) == prompt
    assert not any(document.is_learnt[: len(prompt)])
    assert document.is_learnt[len(prompt)]


def test_recognised_examples_are_plain_values() -> None:
    assert recognise({"text": "a"}, {}) == Text("a")
    assert recognise({"prompt": "a", "completion": "b", "id": 3}, {}) == Pair("a", "b")
    with pytest.raises(RowError):
        recognise({}, {})
