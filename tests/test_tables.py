"""The one table formatter of the lab."""

from lab.tables import format_table


def test_numbers_stand_right_words_left_and_short_rows_are_filled():
    rows = [["SimCSE", "74.20 ± 0.08", 3, "+0.1"], ["without h", "-", 12], ["*paper*", "*81.47*"]]
    assert format_table(["", "STS-B dev", "seeds", ""], rows) == (
        "|           |    STS-B dev | seeds |      |\n"
        "| --------- | -----------: | ----: | ---: |\n"
        "| SimCSE    | 74.20 ± 0.08 |     3 | +0.1 |\n"
        "| without h |            - |    12 |      |\n"
        "| *paper*   |      *81.47* |       |      |"
    )


def test_a_table_without_rows_and_columns_without_values():
    assert format_table(["a", "b"], []) == "| a   | b   |\n| --- | --- |"
    assert format_table(["a"], [[""], ["1 %"]]).splitlines()[1] == "| --: |"
