"""The licence of a model card, as people write it."""

from __future__ import annotations

import pytest

from compressor.model.model_card import Licence, read_licence

FRONT = {
    "license: mit": {"license": "mit"},
    'license: "apache-2.0"': {"license": "apache-2.0"},
    "license: 'apache-2.0'  # a comment": {"license": "apache-2.0"},
    "license:\n- mit": {"license": "mit"},
    "license: [mit]": {"license": "mit"},
    "license:\n  - mit\n  - apache-2.0": {"license": ["mit", "apache-2.0"]},
    "license: other\nlicense_name: llama3\nlicense_link: LICENSE": {
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
    },
    "license: 'other'\nlicense_link: 'https://example.org/a: b#c'": {
        "license": "other",
        "license_link": "https://example.org/a: b#c",
    },
    "License: mit": {"license": "other"},
    "license:": {"license": "other"},
    "license: null": {"license": "other"},
    "license: {a: b}": {"license": "other"},
    "license: true": {"license": "other"},
    "license: >\n  mit": {"license": "mit"},
    "tags: [a\nlicense: mit\n": {"license": "mit"},
    "\tbad: x\nlicense:\n- mit\n- gpl-3.0\nother: x": {"license": ["mit", "gpl-3.0"]},
    "a: b: c\nlicense: 'mit\nlicense_name: x": {"license": "other", "license_name": "x"},
    "date: 2024-99-99\nlicense: mit": {"license": "mit"},
    "license: &a mit\nx: *a": {"license": "mit"},
    "x: *nothing\nlicense: mit": {"license": "mit"},
    "!!python/object/apply:os.system [ls]\n": {"license": "other"},
    "[" * 5000: {"license": "other"},
    "- a\n- b": {"license": "other"},
    'license: "\\ud800"': {"license": "other"},
    'x: "\\ud800"\nlicense: mit': {"license": "mit"},
    'license: [mit, "\\ud800"]': {"license": "mit"},
    "license: " + "x" * 1000: {"license": "x" * 300},
}


@pytest.mark.parametrize("front", FRONT, ids=lambda text: text[:20].replace("\n", " "))
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_front_matter_is_read_as_yaml(front, ends, mark, tmp_path):
    text = f"{mark}---\n{front}\n---\n# A model\nlicense: of the text\n".replace("\n", ends)
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_licence(tmp_path).front_matter() == FRONT[front]


@pytest.mark.parametrize(
    "content", [b"", b"# A model", b"---\nlicense: mit\n", b"\n---\nlicense: mit\n---\n", b"\xff\xfe"]
)
def test_a_card_without_front_matter_states_none(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    assert read_licence(tmp_path) == Licence()


def test_no_card_states_none(tmp_path):
    assert read_licence(tmp_path).front_matter() == {"license": "other"}
