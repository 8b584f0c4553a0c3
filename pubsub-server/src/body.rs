//! The bytes of a stored message, which mostly lie in a row of messages.
//!
//! In a row each message is a field of a protobuf message, one after the other, so that a piece of the
//! row can be sent as it is. Which field of which message is written down in `docs/format.md`.

use std::fmt;
use std::ops::{Deref, Range};

use bytes::{BufMut, Bytes};
use prost::encoding::{decode_varint, encode_varint, encoded_len_varint};

/// The tag of the field, with its kind: bytes with a length.
const FIELD: u8 = 4 << 3 | 2;

/// An encoded message.
#[derive(Clone)]
pub struct Body {
    row: Bytes,
    /// Where its field begins; where it does itself, if it is not in one.
    field: usize,
    start: usize,
    end: usize,
}

impl Body {
    /// That of the field that begins there.
    pub fn in_row(row: &Bytes, field: usize) -> Option<Self> {
        let Range { start, end } = read_field(row, field)?;
        Some(Self { row: row.clone(), field, start, end })
    }

    /// The row, and where the field is, if it is in one.
    pub fn field(&self) -> Option<(&Bytes, Range<usize>)> {
        (self.field < self.start).then_some((&self.row, self.field..self.end))
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes, which are not copied.
    pub fn bytes(&self) -> Bytes {
        self.row.slice(self.start..self.end)
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.row.get(self.start..self.end).unwrap_or_default()
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Bytes> for Body {
    fn from(row: Bytes) -> Self {
        let end = row.len();
        Self { row, field: 0, start: 0, end }
    }
}

impl PartialEq for Body {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Body {}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// The bytes of a field with a message of so many.
pub(crate) fn field_len(body: usize) -> usize {
    1 + encoded_len_varint(body as u64) + body
}

/// Writes a message as a field.
pub(crate) fn put_field(body: &[u8], row: &mut impl BufMut) {
    row.put_u8(FIELD);
    encode_varint(body.len() as u64, row);
    row.put_slice(body);
}

/// Where the message is of the field that begins there.
pub(crate) fn read_field(row: &[u8], at: usize) -> Option<Range<usize>> {
    let (tag, mut rest) = row.get(at..)?.split_first()?;
    let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
    let start = row.len() - rest.len();
    (*tag == FIELD && length <= rest.len()).then(|| start..start + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_found_where_it_was_put() {
        let bodies = [0, 1, 127, 128, 20_000].map(|length| vec![7_u8; length]);
        let mut row = vec![1, 2, 3];
        let mut fields = Vec::new();
        for body in &bodies {
            let from = row.len();
            put_field(body, &mut row);
            assert_eq!(row.len() - from, field_len(body.len()));
            fields.push(from..row.len());
        }
        let row = Bytes::from(row);
        for (body, field) in bodies.iter().zip(fields) {
            let found = Body::in_row(&row, field.start).unwrap();
            assert_eq!((&*found, found.field()), (&**body, Some((&row, field))));
            assert_eq!((found.len(), found.is_empty()), (body.len(), body.is_empty()));
            assert_eq!(found, Body::from(Bytes::from(body.clone())));
        }
        assert_eq!(Body::from(row).field(), None);
    }

    #[test]
    fn a_field_that_is_cut_off_or_another_one_is_none() {
        let mut row = vec![1, 2, 3];
        put_field(&[7; 200], &mut row);
        assert!(read_field(&row, 3).is_some());
        assert!(read_field(&row[..row.len() - 1], 3).is_none());
        for at in [0, 1, 2, row.len(), row.len() + 1] {
            assert!(read_field(&row, at).is_none(), "{at}");
        }
    }
}
