"""Plugins: modules and files that register providers."""

import pytest

from dspnet_fast import plugins
from dspnet_fast.errors import InputError


def test_files_and_modules_are_imported_once(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("import builtins; builtins.imported_plugins.append('one')")
    (tmp_path / "two_dspnet.py").write_text("import builtins; builtins.imported_plugins.append('two')")
    monkeypatch.setattr("builtins.imported_plugins", [], raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        assert plugins.load(f"{tmp_path}/one.py, two_dspnet") == [tmp_path / "one.py", tmp_path / "two_dspnet.py"]
    import builtins

    assert builtins.imported_plugins == ["one", "two"]


def test_plugin_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match="the plugin no_such_module cannot be imported: ModuleNotFoundError"):
        plugins.load("no_such_module")
    for _ in range(2):
        with pytest.raises(InputError, match="broken.py cannot be imported: ZeroDivisionError"):
            plugins.load(str(tmp_path / "broken.py"))
    assert plugins.load("") == []
