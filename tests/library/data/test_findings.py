from library.data.findings import error, merged, warning


def test_what_several_places_have_in_common_is_said_once():
    first, second = warning("no captions", "a.toml:3", "Write them."), warning("no captions", "a.toml:9", "Write them.")
    other = error("no captions", "a.toml:9", "Write them.")
    found = merged([first, other, second, first])
    assert found == (warning("no captions", "a.toml:3, a.toml:9", "Write them."), other)
