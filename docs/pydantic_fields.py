"""Lets the API reference show the fields of pydantic models as parameters, as it shows those of dataclasses."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Extension, Function, Parameter, ParameterKind, Parameters


class PydanticFields(Extension):
    """Gives each model an ``__init__`` made of its annotated fields and of those that it inherits."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Go through a package once it is loaded."""
        self._visit(pkg)

    def _visit(self, scope: Any) -> None:
        for member in list(scope.members.values()):
            if member.is_alias:
                continue
            if member.is_module:
                self._visit(member)
            elif member.is_class and self._is_model(member):
                member.set_member("__init__", _init(member))

    def _is_model(self, cls: Class) -> bool:
        bases = [getattr(base, "canonical_path", str(base)) for base in cls.bases]
        return "pydantic.BaseModel" in bases or any(self._is_model(base) for base in cls.resolved_bases)


def _init(cls: Class) -> Function:
    parents = [parent for parent in reversed(cls.mro()) if not parent.is_alias]
    fields = {
        name: field for scope in (*parents, cls) for name, field in scope.members.items() if _is_field(field)
    }
    parameters = [
        Parameter(name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)
        for name, field in fields.items()
    ]
    return Function(
        "__init__", parameters=Parameters(Parameter("self", kind=ParameterKind.positional_only), *parameters)
    )


def _is_field(member: Any) -> bool:
    return (
        isinstance(member, Attribute)
        and member.annotation is not None
        and "instance-attribute" in member.labels
    )
