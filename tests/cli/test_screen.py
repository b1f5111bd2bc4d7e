"""What a person sees of several texts at once."""

import io

from isthmus.cli.screen import LiveScreen, open_screen
from isthmus.cli.table import table


def test_pipe_gets_whole_blocks_in_order():
    out = io.StringIO()
    with open_screen(out) as screen:
        screen.progress("sum", "8")
        screen.finished("sum", "What is 47 + 38?", "85")
    assert out.getvalue() == "sum           What is 47 + 38?\n              85\n"


def test_terminal_keeps_one_line_a_request_and_control_characters_out():
    out = io.StringIO()
    screen = LiveScreen(out, 40)
    screen.progress("a", "one\n\x1b[2Jtwo " * 20)
    screen.finished("b", "Q", "done")
    screen.close()
    drawn = out.getvalue()
    assert "\x1b[2J" not in drawn
    assert max(len(line) for line in drawn.splitlines()) < 60
    assert drawn.endswith("\x1b[A\r\x1b[J")


def test_table_aligns_columns():
    assert table(("name", "n"), [("a", "1"), ("bb", "22")], right=(1,)) == "name   n\n----  --\na      1\nbb    22\n"
