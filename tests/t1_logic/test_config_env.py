"""${ENV} expansion: LiteFS's forms, and a clear line for everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylitefs.config_env import expand
from pylitefs.errors import ConfigError

ENVIRON = {"A": "one", "B": "one", "C": "two", "EMPTY": "", "my.var-1": "dotted", "BAD": "x\ny"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: $A", "x: one"),
        ("x: ${A}", "x: one"),
        ("x: ${ A }", "x: one"),
        ("x: $A/$C-${A}${C}", "x: one/two-onetwo"),
        ("x: $A.b", "x: one.b"),
        ("x: $AB", "x: "),
        ("x: ${UNSET}", "x: "),
        ("x: ${my.var-1}", "x: dotted"),
        ("x: ${A == 'one'}", "x: true"),
        ("x: ${A=='two'}", "x: false"),
        ('x: ${ A != "one" }', "x: false"),
        ('x: ${ A != "two" }', "x: true"),
        ("x: ${A == B}", "x: true"),
        ("x: ${A == C}", "x: false"),
        ("x: ${A != C}", "x: true"),
        ("x: ${UNSET == ''}", "x: true"),
        ("x: ${UNSET == EMPTY}", "x: true"),
        ("x: ${A == 'it''s'}", "x: false"),
        ("x: $$A costs 5$ or $1", "x: $A costs 5$ or $1"),
        ("x: $${A}", "x: ${A}"),
        ("# ${ not a reference\n  # $A\nx: $A # $C", "# ${ not a reference\n  # $A\nx: one # two"),
        ("a\r\nb: $A\r\n", "a\r\nb: one\r\n"),
        ("", ""),
    ],
)
def test_forms(text: str, expected: str) -> None:
    assert expand(text, ENVIRON) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: ${A\n", 'f.yml:2: "${" has no "}" in the same line: write $$ for a plain dollar sign'),
        ("a: ${}", 'f.yml:1: cannot expand "${}": use ${NAME}, '),
        ("a: ${A:-x}", 'f.yml:1: cannot expand "${A:-x}": use ${NAME}, '),
        ("a: ${A = 'x'}", "f.yml:1: cannot expand \"${A = 'x'}\": use "),
        ("a: ${'x' == A}", "f.yml:1: cannot expand \"${'x' == A}\": use "),
        ("\n\n\na: $BAD", "f.yml:4: the value of the environment variable BAD has a line break: use one line"),
    ],
)
def test_what_is_not_a_form_is_an_error_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(text, ENVIRON, "f.yml")
    assert str(caught.value).startswith(expected)


@given(st.text(alphabet="$" + "{}AB ='!\n#\"x", max_size=40))
def test_lines_stay_where_they_are(text: str) -> None:
    try:
        assert expand(text, ENVIRON).count("\n") == text.count("\n")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@given(st.text(max_size=100).filter(lambda text: "$" not in text))
def test_text_without_a_dollar_is_unchanged(text: str) -> None:
    assert expand(text, ENVIRON) == text
