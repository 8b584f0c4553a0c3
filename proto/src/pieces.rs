//! Bytes that lie in several places.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Below this it costs less to copy than to keep apart.
const SMALL: usize = 256;

/// Bytes in several places, one after the other. What is large is not copied: not when it is put
/// here, and not when [`Buf::copy_to_bytes`] takes it from one of these places.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<Bytes>,
    /// Bytes of these.
    bytes: usize,
    /// What comes after them.
    tail: BytesMut,
}

impl Pieces {
    /// Adds bytes.
    pub fn push(&mut self, piece: Bytes) {
        if piece.len() < SMALL {
            self.tail.put(piece);
        } else {
            self.close();
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// To add bytes that are small.
    pub fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// The first of the pieces.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.close();
        let piece = self.pieces.pop_front()?;
        self.bytes -= piece.len();
        Some(piece)
    }

    fn close(&mut self) {
        if !self.tail.is_empty() {
            self.bytes += self.tail.len();
            self.pieces.push_back(self.tail.split().freeze());
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.bytes + self.tail.len()
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&self.tail, |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = self.pieces.iter().map(|piece| &**piece);
        let tail = (!self.tail.is_empty()).then_some(&*self.tail);
        let mut used = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces.chain(tail)) {
            *slice = IoSlice::new(piece);
            used += 1;
        }
        used
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.pieces.front_mut() {
            let part = count.min(piece.len());
            piece.advance(part);
            self.bytes -= part;
            count -= part;
            if !piece.is_empty() {
                return;
            }
            self.pieces.pop_front();
        }
        self.tail.advance(count);
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        match self.pieces.front_mut() {
            Some(piece) if count < piece.len() => {
                self.bytes -= count;
                piece.split_to(count)
            }
            Some(piece) if count == piece.len() => {
                self.bytes -= count;
                let piece = mem::take(piece);
                self.pieces.pop_front();
                piece
            }
            Some(_) => {
                assert!(count <= self.remaining(), "fewer than {count} bytes are left");
                let mut bytes = BytesMut::with_capacity(count);
                bytes.put(self.take(count));
                bytes.freeze()
            }
            None => self.tail.split_to(count).freeze(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filled(pieces: &[Vec<u8>]) -> (Pieces, Vec<u8>) {
        let mut filled = Pieces::default();
        for (at, piece) in pieces.iter().enumerate() {
            if at % 3 == 2 {
                filled.tail().put_slice(piece);
            } else {
                filled.push(piece.clone().into());
            }
        }
        (filled, pieces.concat())
    }

    fn some() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let length = prop_oneof![0..4_usize, SMALL - 2..SMALL + 3];
        let piece = (length, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]);
        proptest::collection::vec(piece, 0..8)
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_put(
            pieces in some(),
            steps in proptest::collection::vec((0_usize..600, any::<bool>()), 0..10),
        ) {
            let (mut pieces, bytes) = filled(&pieces);
            let mut rest = &*bytes;
            for (step, take) in steps {
                prop_assert_eq!(pieces.remaining(), rest.len());
                prop_assert_eq!(pieces.chunk().is_empty(), rest.is_empty());
                prop_assert!(rest.starts_with(pieces.chunk()));
                let mut slices = [IoSlice::new(&[]); 8];
                let used = pieces.chunks_vectored(&mut slices);
                let all: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
                prop_assert_eq!(all, rest);
                let (step, after) = rest.split_at(step.min(rest.len()));
                if take {
                    prop_assert_eq!(pieces.copy_to_bytes(step.len()), step);
                } else {
                    pieces.advance(step.len());
                }
                rest = after;
            }
            let mut popped = Vec::new();
            while let Some(piece) = pieces.pop() {
                prop_assert!(!piece.is_empty());
                popped.extend(piece);
            }
            prop_assert_eq!(popped, rest);
            prop_assert_eq!(pieces.remaining(), 0);
        }
    }

    #[test]
    fn large_ones_are_not_copied_and_small_ones_are_put_together() {
        let large: Vec<Bytes> = (0..2).map(|byte| vec![byte; SMALL].into()).collect();
        let mut pieces = Pieces::default();
        pieces.push(large[0].clone());
        (0..SMALL).for_each(|_| pieces.push(Bytes::from_static(b"s")));
        pieces.push(large[1].clone());
        assert_eq!(pieces.pieces.len(), 3);
        assert_eq!(pieces.copy_to_bytes(1).as_ptr(), large[0].as_ptr());
        assert_eq!(pieces.copy_to_bytes(SMALL - 1).as_ptr(), large[0][1..].as_ptr());
        pieces.advance(SMALL);
        assert_eq!(pieces.copy_to_bytes(SMALL).as_ptr(), large[1].as_ptr());
    }
}
