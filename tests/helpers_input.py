"""Commands that must fail, and files with changes."""

import json


def fails(capsys, main, *args):
    """Run a command that must fail; returns its line."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:                           # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sidfast: "), error
    return lines[0]


def edit(name, **values):
    """change(folder): sets keys of a JSON file there."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change
