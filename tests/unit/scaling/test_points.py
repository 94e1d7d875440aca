from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.scaling.analysis import analyse
from hopescale.scaling.points import Table, read_points
from hopescale.scaling.summary import other_losses


def read(folder: Path, text: str, **options) -> Table:
    path = folder / "runs.csv"
    path.write_text(text)
    return read_points(path, **options)


@pytest.mark.parametrize(
    "text",
    [
        "N,D,loss\n1e6,2e7,3.5\n2e6,4e7,3.0\n",
        "Model Size,Training FLOP,loss\n1e6,1.2e14,3.5\n2e6,4.8e14,3.0\n",
        "\ufefftokens;flops;Validation loss\n2e7;1.2e14;3.5\n\n4e7;4.8e14;3.0\n",
        "trial\tparams\tnum_tokens\tfinal_loss\nt0\t1e6\t2e7\t3.5\nt1\t2e6\t4e7\t3.0\n",
    ],
)
def test_two_of_three_columns_by_many_names(tmp_path, text):
    runs = read(tmp_path, text).series["all"]
    assert runs.params == pytest.approx([1e6, 2e6])
    assert runs.tokens == pytest.approx([2e7, 4e7])
    assert runs.flops == pytest.approx([1.2e14, 4.8e14])
    assert runs.loss.tolist() == [3.5, 3.0]


def test_counted_flops_win_over_six_n_d(tmp_path):
    runs = read(tmp_path, "N,D,FLOP,loss\n1e6,2e7,1.8e14,3.5\n4e6,2e7,3.6e14,3\n").series["all"]
    assert (runs.params[0], runs.tokens[0], runs.flops[0]) == (1e6, 2e7, 1.8e14)
    cost = runs.cost()
    assert cost.growth == pytest.approx(-0.5)
    assert [cost.per_param_token(size) for size in (1e6, 2e6, 4e6)] == pytest.approx([9, 9 / 2**0.5, 4.5])


def test_flops_that_do_not_rise_with_size_are_refused(tmp_path):
    text = "N,D,FLOP,loss\n1e6,2e7,1e14,3.5\n4e6,2e7,1e14,3\n"
    with pytest.raises(DataError, match="must rise with the parameters"):
        read(tmp_path, text).series["all"].cost()


def test_series_by_their_column(tmp_path):
    text = "series,mixer,N,D,loss\nhope,a,1e6,1e7,3\nplain,b,1e6,1e7,4\nhope,b,2e6,1e7,2\n"
    table = read(tmp_path, text)
    assert {name: runs.loss.tolist() for name, runs in table.series.items()} == {"hope": [3, 2], "plain": [4]}
    assert list(read(tmp_path, text, series_column="mixer").series) == ["a", "b"]


def test_what_did_not_finish_is_left_out_and_named(tmp_path):
    text = "N,D,loss,state\n1e6,1e7,nan,done\n1e6,1e7,9,diverged\n1e6,1e7,,running\n1e6,1e7,inf,\n1e6,1e7,3,done\n"
    table = read(tmp_path, text)
    assert table.series["all"].loss.tolist() == [3]
    assert table.left_out == ["row 2: loss is nan", "row 3: diverged", "row 4: running", "row 5: loss is inf"]


def test_the_highest_losses_can_be_left_out(chinchilla):
    table = read_points(chinchilla, drop_highest=5)
    everything = read_points(chinchilla).series["all"]
    assert len(everything) == 245 and len(table.series["all"]) == 240
    assert sorted(table.series["all"].loss) == pytest.approx(np.sort(everything.loss)[:-5])
    assert len(table.left_out) == 5 and "5.006" in table.left_out[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("N,D\n1,2\n", "no column for loss, only N, D"),
        ("N,loss\n1,2\n", "no column for two of N, D and FLOP, only N, loss"),
        ("N,D,loss\n1e6,1e7,3\n1e6,x,3\n", "row 3, column D: 'x' is not a number"),
        ("N,D,loss\n1e6,,3\n", "no finished run \\(1 left out\\) row 2: no D"),
        ("N,D,loss\n-1e6,1e7,3\n", "row 2, column N: -1e\\+06, but must be above 0"),
        ("N,D,loss\n1e6,1e7,-3\n", "row 2, column loss: -3, but must be above 0"),
        ("N,D,FLOP,loss\n1e6,1e7,0,3\n", "row 2, column FLOP: 0, but must be above 0"),
        ("N,D,loss\n1e6,1e7\n", "row 2: 2 cells, but the first row names 3 columns"),
        ('N,D,loss\n1e6,1e7,"3\n' + "1e6,1e7,3\n" * 20_000, "a quote that is never closed"),
        ("N,D,loss\n1e6,1e7,nan\n", "no finished run \\(1 left out\\)"),
    ],
)
def test_a_bad_table_is_one_message(tmp_path, text, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")


def test_a_missing_file_or_column_is_one_message(tmp_path, chinchilla):
    with pytest.raises(DataError, match="cannot read"):
        read_points(tmp_path / "none.csv")
    with pytest.raises(DataError, match="has no column 'mixer', only Model Size, Training FLOP, loss"):
        read_points(chinchilla, series_column="mixer")


def test_a_table_exported_from_a_tracker(tmp_path):
    text = (
        '"Name","State","num_params","tokens","compute_budget","loss","val_loss"\n'
        '"a","finished","1000000","20000000","1.2e14","3.1","3.5"\n'
        '"b","Finished","2000000","40000000","4.8e14","2.9","3.0"\n'
        '"c","crashed","2000000","40000000","4.8e14","9","9"\n'
        '"d","finished","2000000","40000000","4.8e14","2.9","None"\n'
        '"e","finished","null","40000000","4.8e14","2.9","3.1"\n'
        '"f","finished","N/A","40000000","4.8e14","2.9","3.1"\n'
    )
    table = read(tmp_path, text)
    assert table.series["all"].loss.tolist() == [3.5, 3.0]
    assert table.series["all"].flops.tolist() == [1.2e14, 4.8e14]
    assert table.left_out == ["row 4: crashed", "row 5: no loss", "row 6: no N", "row 7: no N"]
    assert read(tmp_path, text, loss_column="loss").series["all"].loss.tolist()[:2] == [3.1, 2.9]


def test_the_best_of_several_runs_of_a_size_is_taken(tmp_path):
    table = read(tmp_path, "N,D,lr,loss\n1e6,1e7,1,3.2\n1e6,1e7,2,3\n1e6,1e7,4,3\n2e6,1e7,1,2.9\n")
    assert table.series["all"].loss.tolist() == [3.0, 2.9]
    assert table.left_out == [
        "row 2: loss 3.2, but row 3 is the best of its size and tokens",
        "row 4: loss 3, but row 3 is the best of its size and tokens",
    ]


def test_losses_of_several_texts_make_no_law(tmp_path: Path):
    """Means of training losses over fewer steps are of one kind; series of other texts are read, and told apart."""
    path, head = tmp_path / "runs.csv", "series,N,D,loss,loss_from\n"
    path.write_text(head + 'a,1e6,1e7,3.1,"train, mean of 10"\na,2e6,1e7,3.0,"train, mean of 7"\nb,1e6,1e7,3,val/c4\n')
    table = read_points(path)
    assert table.losses_of == {"a": "train", "b": "val/c4"}
    note = other_losses(analyse(table, resamples=0, need_laws=False))
    assert note == "losses of a are of train, those of b of val/c4: they do not compare"
    path.write_text(head + 'a,1e6,1e7,3.1,"train, mean of 10"\na,1e6,1e7,3.2,val/c4\n')
    with pytest.raises(DataError, match=r"series a: column loss holds losses of train \(row 2\) and val/c4 \(row 3\)"):
        read_points(path)


def test_scores_of_several_suites_do_not_compare(tmp_path: Path):
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss,score,score_from\n1e6,1e7,3.1,0.5,mqar\n2e6,1e7,3.0,0.4,parity\n3e6,1e7,2.9,,\n")
    with pytest.raises(DataError, match=r"score holds mqar \(row 2\) and parity \(row 3\), which do not compare"):
        read_points(path).scores()
