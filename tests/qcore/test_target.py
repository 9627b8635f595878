import pytest

from qcore.errors import ConfigError
from qcore.target import PROFILES, host_target, load_target


@pytest.mark.parametrize("name", sorted(p.stem for p in PROFILES.glob("*.yaml")))
def test_every_shipped_profile_loads_under_its_own_name(name):
    assert load_target(name).name == name


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "x86-vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "x86-vnni"),
        ("x86_64", {"avx2"}, "x86-avx2"),
        ("AMD64", set(), "x86-avx2"),  # a system that does not tell: the choice that is right everywhere
        ("aarch64", set(), "arm-dotprod"),
    ],
)
def test_the_host_gets_the_profile_of_its_instructions(machine, flags, name):
    assert host_target(machine, frozenset(flags)) == name


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="no profile for the host's architecture riscv64"):
        host_target("riscv64", frozenset())


def test_a_profile_of_ones_own_is_read_and_checked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndescription: d\nactivations: int8\nquantize: [Conv]\n")
    assert load_target(str(path)).weights == "int8"
    path.write_text("name: mine\ndescription: d\nactivation: int8\nquantize: [Conv]\n")
    with pytest.raises(ConfigError, match="unknown field 'activation'; did you mean 'activations'"):
        load_target(str(path))
