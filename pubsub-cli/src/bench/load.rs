//! What is published.

use std::time::SystemTime;

use bytes::Bytes;
use pubsub_client::Message;

/// A number that no other run has.
pub(super) fn unique() -> u64 {
    let since = crate::values::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let nanos = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    mixed(nanos ^ u64::from(std::process::id()) << 48)
}

/// A payload that does not compress.
pub(super) fn payload(size: usize) -> Bytes {
    let words = (0..size as u64 / 8 + 1).flat_map(|word| mixed(word).to_le_bytes());
    words.take(size).collect()
}

/// Messages to publish, all of one payload.
#[derive(Clone, Debug)]
pub(super) struct Messages {
    payload: Bytes,
    /// Where the keys come from, if there are any.
    keys: Option<u64>,
}

impl Messages {
    pub(super) fn new(size: usize, with_keys: bool) -> Self {
        Self { payload: payload(size), keys: with_keys.then(unique) }
    }

    pub(super) fn nth(&self, number: u64) -> Message {
        let message = Message::new(self.payload.clone());
        match self.keys {
            // As random as a UUID, and as unique.
            Some(seed) => {
                let key = format!("{:016x}{:016x}", mixed(seed ^ number), mixed(number));
                message.with_idempotency_key(key)
            }
            None => message,
        }
    }
}

/// A one-to-one scrambling of numbers.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
