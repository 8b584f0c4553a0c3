//! What scenarios publish: unique values whose bytes can be checked.

use std::fmt;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::seed::Rng;

/// A value is published as its two numbers, followed by up to this many bytes that depend on
/// them, so that a wrong byte anywhere is noticed.
const MAX_TAIL: u64 = 200;

const NUMBERS: usize = 8;

/// One publish of one publisher: the identity of a message for the checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value {
    /// Who publishes it.
    pub publisher: u32,
    /// Which of the publisher's messages it is, in the order of its calls.
    pub counter: u32,
}

impl Value {
    /// The bytes that are published for it.
    pub fn payload(self) -> Bytes {
        let mut rng = Rng::new(u64::from(self.publisher) << 32 | u64::from(self.counter));
        let tail = usize::try_from(rng.below(MAX_TAIL)).expect("it is small");
        let mut bytes = BytesMut::with_capacity(NUMBERS + tail);
        bytes.put_u32(self.publisher);
        bytes.put_u32(self.counter);
        bytes.put_slice(&rng.bytes(tail));
        bytes.freeze()
    }

    /// The value that was published as these bytes; `None` if no value is.
    pub fn of(payload: &[u8]) -> Option<Self> {
        let (publisher, rest) = payload.split_first_chunk()?;
        let (counter, _) = rest.split_first_chunk()?;
        let value = Self {
            publisher: u32::from_be_bytes(*publisher),
            counter: u32::from_be_bytes(*counter),
        };
        (value.payload() == payload).then_some(value)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}#{}", self.publisher, self.counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_and_a_wrong_byte_does_not() {
        let value = Value { publisher: 3, counter: 77 };
        let payload = value.payload();
        assert_eq!(Value::of(&payload), Some(value));
        for index in 0..payload.len() {
            let mut bad = payload.to_vec();
            bad[index] ^= 1;
            assert_eq!(Value::of(&bad), None, "byte {index}");
        }
        assert_eq!(Value::of(&payload[..payload.len() - 1]), None);
    }
}
