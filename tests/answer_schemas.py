"""A hundred JSON schemas that callers might send: nested, enums, arrays, recursion, numbers,
formats, patterns, anyOf; each with a question that it answers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "maxLength": 24}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{2,9}$"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
FLAG: Schema = {"type": "boolean"}
LEAF = {"$ref": "#/$defs/leaf"}
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")
PATTERNS = (
    "^[A-Z]{3}-[0-9]{4}$",
    "^(red|green|blue)$",
    r"^\d{1,3}(,\d{3})*$",
    "^#[0-9a-f]{6}$",
    r"^v\d+\.\d+\.\d+$",
    "^[^\\s]{3,12}$",
    "ab+c",
    r"^\+?[0-9 ]{7,12}$",
    "^(a|b(c|d)){2,4}$",
    "^[À-ÿ]{3}$",
)
RANGES: tuple[Schema, ...] = (
    {"type": "integer", "minimum": 10, "maximum": 20},
    {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5},
    {"type": "integer", "minimum": 1000, "maximum": 100000},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    {"type": "number", "minimum": -1.5, "maximum": -0.25},
    {"enum": [1, 2.5, -3, 1000000]},
    {"const": 42},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
)
ENUMS: tuple[Schema, ...] = (
    {"enum": ["yes", "no"]},
    {"enum": ["low", "medium", "high", None]},
    {"enum": [True, False, None]},
    {"enum": ['quo"te', "back\\slash", "new\nline", "ünï"]},
    {"enum": [f"option {i}" for i in range(60)]},
    {"enum": ["a", "ab", "abc", "abcd"]},
    {"const": {"fixed": [1, "two", None]}},
    {"enum": [[1, 2], {"a": 1}, "text"]},
    {"type": "string", "enum": ["", "x"]},
    {"enum": ["日本", "中国", "한국"]},
)


class Case(NamedTuple):
    """A schema and what is asked."""

    schema: Schema
    question: str


def record(properties: Schema, *optional: str, closed: bool = True, **more: Any) -> Schema:
    """An object; all of its properties but `optional` are required."""
    required = [name for name in properties if name not in optional]
    made: Schema = {"type": "object", "properties": properties, "required": required, **more}
    return {**made, "additionalProperties": False} if closed else made


def items(schema: Schema, low: int = 1, high: int = 3) -> Schema:
    return {"type": "array", "items": schema, "minItems": low, "maxItems": high}


def nested(depth: int) -> Schema:
    inner = record({"value": COUNT})
    for level in range(depth):
        inner = record({f"level{level}": inner, "note": WORD})
    return inner


TREE: Schema = {
    **record({"name": WORD, "children": items({"$ref": "#/$defs/node"}, 0, 2)}),
    "$defs": {"node": record({"name": WORD, "children": items({"$ref": "#/$defs/node"}, 0, 1)})},
}
LIST: Schema = {
    "$ref": "#/$defs/list",
    "$defs": {
        "list": record(
            {"head": COUNT, "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}}
        )
    },
}
SUM: Schema = {
    "$ref": "#/$defs/term",
    "$defs": {
        "term": {
            "anyOf": [
                COUNT,
                record({"op": {"enum": ["+", "-"]}, "of": items({"$ref": "#/$defs/term"}, 2, 2)}),
            ]
        }
    },
}
SHARED: Schema = {
    **record({"first": LEAF, "second": LEAF, "more": items(LEAF, 0, 2)}),
    "$defs": {"leaf": record({"id": COUNT, "tag": {"enum": ["a", "b"]}})},
}
SHAPE: Schema = {
    "anyOf": [
        record({"kind": {"const": "circle"}, "radius": COUNT}),
        record({"kind": {"const": "box"}, "width": COUNT, "height": COUNT}),
        record({"kind": {"const": "text"}, "body": TEXT}),
    ]
}
ONE_OF: Schema = {"oneOf": SHAPE["anyOf"]}
PERSON = record({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 130}})
ADDRESS = record({"street": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
ALL_OF: Schema = {
    "allOf": [record({"a": COUNT}, closed=False), record({"b": WORD}, closed=False)],
    "additionalProperties": False,
    "properties": {"a": {}, "b": {}},
}

PAIR: Schema = {"type": "array", "prefixItems": [WORD, COUNT], "items": False}

SPECIAL: tuple[Case, ...] = (
    Case(PERSON, "Who is Ada?"),
    Case(record({"person": PERSON, "home": ADDRESS}), "Where does Ada live?"),
    Case(record({"people": items(PERSON)}), "Name the authors."),
    Case(record({"name": TEXT, "nick": TEXT, "age": COUNT}, "nick", "age"), "Who is Bob?"),
    Case(record({"tags": items(WORD, 2, 4)}), "Give tags for a harness."),
    Case(record({"matrix": items(items(COUNT, 2, 2), 2, 2)}), "Write a matrix."),
    Case(
        record({"pair": {"type": "array", "prefixItems": [WORD, COUNT], "items": False}}), "A pair?"
    ),
    Case(record({"answer": TEXT, "ok": FLAG}), "What is the capital of France?"),
    Case({"type": "array", "items": FLAG, "minItems": 3, "maxItems": 3}, "Three flags."),
    Case(TREE, "Describe a tree."),
    Case(LIST, "Write a list."),
    Case(SUM, "Write 1 + 2."),
    Case(SHARED, "Give two leaves."),
    Case(SHAPE, "Give a circle."),
    Case(ONE_OF, "Give a box."),
    Case(items(SHAPE, 2, 2), "Give two shapes."),
    Case(ALL_OF, "Give a and b."),
    Case(record({"x": {"anyOf": [WORD, COUNT, {"type": "null"}]}}), "What is x?"),
    Case({"type": "string", "minLength": 3, "maxLength": 12}, "Say a word."),
    Case({"type": "boolean"}, "Is it so?"),
    Case({"type": "null"}, "Nothing?"),
    Case({"type": ["string", "integer"], "maxLength": 9, "minimum": 0, "maximum": 9}, "Say."),
    Case(
        {
            "type": "object",
            "additionalProperties": COUNT,
            "properties": {"total": COUNT},
            "required": ["total"],
        },
        "Count things.",
    ),
    Case(
        {
            "type": "object",
            "patternProperties": {"^k[0-9]$": FLAG},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 2,
        },
        "Set some keys.",
    ),
    Case(record({f"field_{i}": COUNT for i in range(12)}), "Fill in the form."),
    Case(record({'quo"ted': WORD, "spa ce": WORD, "ünï": WORD}), "Strange names?"),
    Case(record({"a": {}, "b": COUNT}), "Anything in a."),
    Case(
        record({"city": TEXT, "temperature": RANGES[6], "unit": {"enum": ["C", "F"]}}), "Weather?"
    ),
    Case(record({"steps": items(record({"do": TEXT, "then": WORD}), 1, 2)}), "How to saddle?"),
    Case({"$comment": "c", "title": "T", "description": "d", **PERSON, "examples": [{}]}, "Who?"),
)


def cases() -> list[Case]:
    """All hundred, the special ones first."""
    made = list(SPECIAL)
    made += [Case(record({"value": one}), "Give a value.") for one in RANGES]
    made += [Case(record({"pick": one}), "Pick one.") for one in ENUMS]
    made += [Case(record({"at": {"type": "string", "format": f}}), f"A {f}?") for f in FORMATS]
    made += [Case(record({"code": {"type": "string", "pattern": p}}), "Code?") for p in PATTERNS]
    made += [Case(nested(depth), "Go deep.") for depth in (1, 2, 3, 4, 6, 8)]
    made += [Case(items(one, 1, 2), "List values.") for one in (*RANGES[:5], *ENUMS[:5])]
    made += [
        Case(record({"a": {"anyOf": [one, other]}, "b": FLAG}), "Either.")
        for one, other in zip(RANGES[:5], ENUMS[:5], strict=True)
    ]
    made += [
        Case(record({f"k{i}": one for i, one in enumerate(group)}), "Mix.")
        for group in (RANGES[:3], RANGES[3:6], ENUMS[:3], ENUMS[3:6], (TEXT, WORD, COUNT))
    ]
    made += [
        Case(record({"inner": record({"deep": items(one, 0, 2)}), "n": COUNT}), "Deep list.")
        for one in (PERSON, SHAPE, ADDRESS, WORD, COUNT)
    ]
    return made
