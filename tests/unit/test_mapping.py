"""Maps: what arithmetic gives, and one line that says what is wrong."""

import math

import polars as pl
import pytest

from disco.errors import UserError
from disco.runs.mapping import with_columns

TABLE = pl.DataFrame(
    {
        "bs": [32, 64, None],
        "log2_lr": [-4.0, -3.5, math.nan],
        "smooth loss": [3.0, 2.5, 2.0],
        "track/x-y": [1.0, 2.0, 4.0],
        "D": [100, 200, 400],
        "N": [10, 10, 10],
        "D/N": [1.5, 2.5, 3.5],
        "text": ["a", "b", "c"],
        "mixed": ["1", "x", "2.5"],
        "lambda": [0.1, 0.2, 0.3],
        "flag": [True, False, None],
    }
)


def mapped(text: str) -> list[object]:
    return with_columns(TABLE, [f"out={text}"])["out"].to_list()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bs", [32, 64, None]),
        ("bs*2048", [65536.0, 131072.0, None]),
        ("bs * 2^11", [65536.0, 131072.0, None]),  # ^ binds as ** does, not as in Python
        ("bs*2**11", [65536.0, 131072.0, None]),
        ("2^log2_lr", [2**-4, 2**-3.5, None]),
        ("exp2(log2_lr)", [2**-4, 2**-3.5, None]),
        ("log2(`track/x-y`)", [0.0, 1.0, 2.0]),
        ("`smooth loss`*0.5 + 1", [2.5, 2.25, 2.0]),
        ("smooth loss", [3.0, 2.5, 2.0]),
        ("D/N", [1.5, 2.5, 3.5]),  # the column of that name
        ("D / N", [10.0, 20.0, 40.0]),
        ("-D + 2*(N - 4)", [-88.0, -188.0, -388.0]),
        ("2^3^2 + 0*D", [512.0] * 3),
        ("2^-1", [0.5] * 3),
        ("log2(8)", [3.0] * 3),
        ("exp2(-1) + 1e0", [1.5] * 3),
        ("'69M'", ["69M"] * 3),
        ("mixed*2", [2.0, None, 5.0]),
        ("`lambda`", [0.1, 0.2, 0.3]),
        ("flag*0.25", [0.25, 0.0, None]),
    ],
)
def test_arithmetic(text: str, expected: list[object]) -> None:
    found = [None if isinstance(value, float) and math.isnan(value) else value for value in mapped(text)]
    assert found == pytest.approx(expected) if isinstance(expected[0], float) else found == expected


def test_names_mean_the_table_as_given_and_then_earlier_maps() -> None:
    table = with_columns(pl.DataFrame({"a": [1.0], "b": [2.0]}), ["a=b", "b=a", "c=a+b", "d=c*10"])
    assert table.row(0) == (2.0, 1.0, 3.0, 30.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lr", "--map takes NAME=EXPRESSION, such as lr=peak_lr or batch=bs*2048, got 'lr'"),
        ("=bs", "--map takes NAME=EXPRESSION"),
        ("lr=", "--map takes NAME=EXPRESSION"),
        ("loss=smoothloss", "no column 'smoothloss'; nearest: smooth loss"),
        ("lr=log2lr*2", "no column 'log2lr'; nearest: log2_lr"),
        ("lr=zzzz", "no column 'zzzz'; there are: bs, log2_lr, smooth loss, track/x-y, D, N, D/N, text and 3 more"),
        ("loss=smooth loss*2", "not an expression; column names that are not plain words go in backquotes"),
        ("lr=2**", "not an expression"),
        ("lr=`bs", "not an expression"),
        ("lr=lambda*2", "not an expression"),
        ("lr=text*2", "column 'text' holds text such as 'a', which is not a number"),
        ("lr=bs//2", "only + - * / ** ^, parentheses, numbers and columns are understood: bs // 2"),
        ("lr=bs if D else N", "only + - * / ** ^"),
        ("lr=bs.real", "only + - * / ** ^"),
        ("lr=(bs,)", "only + - * / ** ^"),
        ("lr=__import__('os').system('true')", "the functions are log2(x) and exp2(x)"),
        ("lr=open('x')", "the functions are log2(x) and exp2(x)"),
        ("lr=log2(bs, 2)", "the functions are log2(x) and exp2(x)"),
        ("lr=9**9**9**9", "the number cannot be computed"),
        ("lr=1/0", "the number cannot be computed"),
        ("lr=(-1)**0.5", "a number in it is not finite"),
        ("lr=log2(0)", "the number cannot be computed"),
        ("lr=True", "True is no number"),
        ("lr=" + "9" * 400, "a number is too large"),
        ("lr=" + "(" * 300 + "1" + ")" * 300, "not an expression"),
        ("lr=" + "-" * 900 + "bs", "nested too deeply"),
        ("lr=" + "1+" * 600 + "1", "longer than 1000 characters"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        with_columns(TABLE, [text])
    message = str(caught.value)
    assert why in message
    assert "\n" not in message


def test_a_name_is_mapped_once() -> None:
    with pytest.raises(UserError, match="--map lr=N: lr is already mapped"):
        with_columns(TABLE, ["lr=D", "lr=N"])
