"""How the tests are shared out where several run at once (`pytest -n 2 --dist loadgroup`)."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one module-scoped fixture in one process, so that it is made once."""
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.items()
        for name, (*_, fixture) in definitions:
            if fixture.scope == "module":
                item.add_marker(pytest.mark.xdist_group(f"{fixture.baseid}:{name}"))
