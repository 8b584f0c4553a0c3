//! Where HTTP/2 frames end in a stream of bytes.

use super::Direction;

/// What a client sends before its first frame.
const PREFACE_BYTES: u64 = 24;

/// The length (3), type (1), flags (1) and stream (4) of a frame.
const HEADER_BYTES: usize = 9;

/// Finds the ends of frames in one direction of one connection, however its bytes are cut up.
#[derive(Debug)]
pub struct FrameScanner {
    offset: u64,
    /// Bytes of the preface or of a payload that are still to come.
    remaining: u64,
    in_preface: bool,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
}

impl FrameScanner {
    /// At the beginning of a connection.
    pub fn new(direction: Direction) -> Self {
        let in_preface = direction == Direction::Up;
        Self {
            offset: 0,
            remaining: if in_preface { PREFACE_BYTES } else { 0 },
            in_preface,
            header: [0; HEADER_BYTES],
            header_filled: 0,
        }
    }

    /// Takes the next bytes and calls `on_end` with the offset, from the start of the
    /// connection, at which each frame among them ends.
    pub fn scan(&mut self, bytes: &[u8], mut on_end: impl FnMut(u64)) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let taken = if self.remaining > 0 { self.skip(rest) } else { self.read_header(rest) };
            self.offset += taken as u64;
            rest = &rest[taken..];
            if self.at_frame_end() {
                self.header_filled = 0;
                on_end(self.offset);
            }
        }
    }

    fn skip(&mut self, bytes: &[u8]) -> usize {
        let wanted = usize::try_from(self.remaining).unwrap_or(usize::MAX);
        let taken = wanted.min(bytes.len());
        self.remaining -= taken as u64;
        if self.in_preface && self.remaining == 0 {
            self.in_preface = false;
        }
        taken
    }

    fn read_header(&mut self, bytes: &[u8]) -> usize {
        let taken = (HEADER_BYTES - self.header_filled).min(bytes.len());
        self.header[self.header_filled..][..taken].copy_from_slice(&bytes[..taken]);
        self.header_filled += taken;
        if self.header_filled == HEADER_BYTES {
            let [high, middle, low, ..] = self.header;
            self.remaining = u64::from(u32::from_be_bytes([0, high, middle, low]));
        }
        taken
    }

    fn at_frame_end(&self) -> bool {
        self.header_filled == HEADER_BYTES && self.remaining == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], 0, 0, 0, 0, 0, 1];
        bytes.resize(HEADER_BYTES + payload, 0xAB);
        bytes
    }

    fn ends(direction: Direction, bytes: &[u8], piece: usize) -> Vec<u64> {
        let mut scanner = FrameScanner::new(direction);
        let mut ends = Vec::new();
        for piece in bytes.chunks(piece) {
            scanner.scan(piece, |end| ends.push(end));
        }
        ends
    }

    #[test]
    fn frame_ends_do_not_depend_on_how_the_bytes_are_cut_up() {
        let bytes = [frame(0), frame(300), frame(1)].concat();
        for piece in [1, 2, 9, 10, 1000] {
            assert_eq!(ends(Direction::Down, &bytes, piece), [9, 318, 328]);
        }
    }

    #[test]
    fn the_preface_of_the_client_is_not_a_frame() {
        let bytes = [vec![b'P'; 24], frame(2)].concat();
        assert_eq!(ends(Direction::Up, &bytes, 5), [35]);
        assert_eq!(ends(Direction::Up, &bytes[..34], 5), [0; 0]);
    }
}
