//! Processing once.
