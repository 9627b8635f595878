import json

from reviewing import drawn

from qcore.cli.main import run


def test_a_review_names_its_files_and_the_verdict(tmp_path, capsys):
    for name, sha256 in (("ptq", "a" * 64), ("qat", "c" * 64)):
        (tmp_path / f"{name}.report.json").write_text(json.dumps(drawn(model=sha256).to_json()))
    ptq, qat = (str(tmp_path / f"{n}.report.json") for n in ("ptq", "qat"))
    out = tmp_path / "out"
    assert run(["review", "--report", ptq, "--report", f"trained={qat}", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "not judged"
    document = json.loads((out / "review.json").read_text())
    assert [c["name"] for c in document["candidates"]] == ["ptq", "trained"]
    assert run(["review", "--report", ptq, "--out", str(out)]) == 0
    assert "NOT JUDGED: " in capsys.readouterr().out
    assert run(["review", "--report", ptq, "--report", f"ptq={qat}", "--out", str(out)]) == 1
    assert "each with a name of its own" in capsys.readouterr().err
    assert run(["review", "--report", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err
