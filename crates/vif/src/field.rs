//! The three states of a field, and how a typed view takes its fields from an [`Object`].

use std::net::IpAddr;

use crate::object::Object;
use crate::value::{IpNetwork, MacAddress, PciAddress, Value};

/// A field of an object: left out, null, or a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Field<T> {
    /// Not there. os-vif raises when code reads such a field.
    #[default]
    Unset,
    /// There, and null.
    Null,
    /// There, with this value.
    Value(T),
}

impl<T> Field<T> {
    /// The value, if there is one.
    pub fn value(&self) -> Option<&T> {
        match self {
            Field::Value(value) => Some(value),
            Field::Unset | Field::Null => None,
        }
    }

    /// The value itself, if there is one.
    pub fn into_value(self) -> Option<T> {
        match self {
            Field::Value(value) => Some(value),
            Field::Unset | Field::Null => None,
        }
    }

    /// Whether the field is there, be it null.
    pub fn is_set(&self) -> bool {
        !matches!(self, Field::Unset)
    }

    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> Field<U> {
        match self {
            Field::Unset => Field::Unset,
            Field::Null => Field::Null,
            Field::Value(value) => Field::Value(f(value)),
        }
    }
}

/// A type that a field of a typed view can have.
pub(crate) trait View: Sized {
    /// `None` if the value is of another type. It never is: the schema's type of each field was enforced on decoding,
    /// and a test reads every field of every class through its view.
    fn view(value: &Value) -> Option<Self>;
}

macro_rules! scalar_views {
    ($($type:ty => $variant:ident,)*) => {$(
        impl View for $type {
            fn view(value: &Value) -> Option<Self> {
                if let Value::$variant(inner) = value { Some(inner.clone()) } else { None }
            }
        }
    )*};
}
scalar_views! {
    String => Text,
    i64 => Integer,
    bool => Boolean,
    MacAddress => Mac,
    PciAddress => Pci,
    IpAddr => Ip,
    IpNetwork => IpNetwork,
}

impl<T: View> View for Vec<T> {
    /// A list, or an object that is one (`SubnetList` …) and has it in its field `objects`.
    fn view(value: &Value) -> Option<Self> {
        match value {
            Value::List(items) => items.iter().map(T::view).collect(),
            Value::Object(list) => Some(list.view("objects").into_value().unwrap_or_default()),
            _ => None,
        }
    }
}

impl Object {
    /// The field `name` as a typed view has it.
    pub(crate) fn view<T: View>(&self, name: &str) -> Field<T> {
        self.field(name).map(|value| T::view(value).expect("a view's types are the schema's"))
    }
}

/// Defines typed views: structures whose fields are the object's fields of the same names, each a [`Field`].
macro_rules! views {
    ($($(#[$doc:meta])* $view:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct $view {
            $($(#[$field_doc])* pub $field: Field<$type>,)*
        }

        impl $view {
            pub(crate) fn of(object: &Object) -> Self {
                $view { $($field: object.view(stringify!($field)),)* }
            }
        }

        impl View for $view {
            fn view(value: &Value) -> Option<Self> {
                if let Value::Object(object) = value { Some($view::of(object)) } else { None }
            }
        }
    )*};
}
pub(crate) use views;
