"""Every family provides what the protocol names, with the parameters it names."""

import inspect
from pkgutil import iter_modules
from types import FunctionType

import pytest

from capa_export.base.errors import CapaError
from capa_export.model import families
from capa_export.model.families import Family, SelectionFamily, VideoFamily, load_family

NAMES = [module.name for module in iter_modules(families.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_one(name: str) -> None:
    family = load_family(name)
    for constant in inspect.get_annotations(Family):
        assert hasattr(family, constant), constant
    protocols = [Family, *(kind for kind in (VideoFamily, SelectionFamily) if isinstance(family, kind))]
    members = {method: wanted for protocol in protocols for method, wanted in vars(protocol).items()}
    for method, wanted in members.items():
        if isinstance(wanted, FunctionType) and not method.startswith("_"):
            given = inspect.signature(getattr(family, method)).parameters
            kinds = [parameter.kind for parameter in inspect.signature(wanted).parameters.values()][1:]
            assert [parameter.kind for parameter in given.values()] == kinds, method


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(CapaError, match="unknown family 'flamingo'"):
        load_family("flamingo")
