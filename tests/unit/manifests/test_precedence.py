"""Claims of several files on one object, against an oracle that sorts them all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer.manifests.precedence import Claims
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Node, Object, Pod

objects = st.builds(Pod, st.sampled_from("xy"), st.sampled_from("ab"), uid=st.sampled_from("12")) | st.builds(
    Node, st.sampled_from("ab")
)
contents = st.lists(objects, max_size=4)


def winners(files: dict[str, list[Object]]) -> dict[tuple[type[Object], str], Object]:
    won: dict[tuple[type[Object], str], Object] = {}
    for path in sorted(files):
        for item in files[path]:
            won.setdefault((type(item), item.key), item)
    return won


@given(st.lists(st.tuples(st.sampled_from(["a.yaml", "b.yaml", "c/a.yaml"]), contents, st.booleans())))
def test_the_first_in_order_speaks_for_an_object_whatever_happened_before(
    steps: list[tuple[str, list[Object], bool]],
) -> None:
    claims, files = Claims(), {}  # type: tuple[Claims, dict[str, list[Object]]]
    handed: dict[tuple[type[Object], str], Object] = {}
    for path, new, take in steps:
        claims.replace(path, old=files.get(path, []), new=new)
        files[path] = new
        if not take:
            continue
        for change in claims.take():
            identity = (change.kind, change.key)
            assert handed.get(identity) != change.object, "only differences are handed on"
            handed.pop(identity, None)
            if change.object is not None:
                handed[identity] = change.object
        assert handed == winners(files)
        assert claims.take() == []
        assert len(claims.duplicates()) == sum(map(len, files.values())) - len(handed)


def test_a_duplicate_names_both_places_and_takes_over_when_the_first_goes() -> None:
    claims = Claims()
    first, second = Pod("x", "a", uid="1"), Pod("x", "a", uid="2")
    claims.replace("b.yaml", old=[], new=[Node("n"), second])
    assert Change(Pod, "x/a", second) in claims.take()
    claims.replace("a.yaml", old=[], new=[first])
    assert claims.take() == [Change(Pod, "x/a", first)]
    assert claims.duplicates() == [
        Rejection("Pod", "x", "a", "b.yaml (object 2): already given at a.yaml (object 1), which stands")
    ]
    claims.replace("a.yaml", old=[first], new=[])
    assert claims.take() == [Change(Pod, "x/a", second)]
    assert claims.duplicates() == []
    claims.replace("b.yaml", old=[Node("n"), second], new=[])
    assert claims.take() == [Change(Node, "n", None), Change(Pod, "x/a", None)]
