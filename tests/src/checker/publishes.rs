//! Judges what was published against what is stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{Anomaly, Event, Id, Log, Value};

pub(super) fn check(history: &[Event], logs: &[Log]) -> Vec<Anomaly> {
    let mut anomalies = lost(history, logs);
    anomalies.extend(phantoms(history, logs));
    anomalies.extend(identities(history, logs));
    for log in logs {
        anomalies.extend(reordered(log));
    }
    anomalies.extend(back_in_time(history, logs));
    anomalies
}

fn lost(history: &[Event], logs: &[Log]) -> Vec<Anomaly> {
    let mut lost = Vec::new();
    for event in history {
        let Event::Stored(value, id) = event else {
            continue;
        };
        let Some(log) = logs.iter().find(|log| log.covers(id)) else {
            continue;
        };
        let entry = log.entries.get(&id.sequence);
        if entry.and_then(|entry| entry.value) != Some(*value) {
            let (value, id) = (*value, id.clone());
            lost.push(Anomaly::Lost { value, id });
        }
    }
    lost
}

fn phantoms(history: &[Event], logs: &[Log]) -> Vec<Anomaly> {
    let mut possible = HashSet::new();
    for event in history {
        match event {
            Event::Invoked(value, _) => possible.insert(*value),
            Event::Refused(value) => possible.remove(value),
            _ => false,
        };
    }
    let stored = logs.iter().flat_map(|log| {
        let entries = log.entries.iter();
        entries.map(|(sequence, entry)| (log.id(*sequence), entry.value))
    });
    stored
        .filter(|(_, value)| value.is_none_or(|value| !possible.contains(&value)))
        .map(|(id, value)| Anomaly::Phantom { id, value })
        .collect()
}

/// One value, one id; one id, one value: over confirmations, deliveries and the log.
fn identities(history: &[Event], logs: &[Log]) -> Vec<Anomaly> {
    let mut ids: BTreeMap<Value, BTreeSet<Id>> = BTreeMap::new();
    let mut values: BTreeMap<Id, BTreeSet<Value>> = BTreeMap::new();
    let mut pair = |value: Value, id: &Id| {
        ids.entry(value).or_default().insert(id.clone());
        values.entry(id.clone()).or_default().insert(value);
    };
    for event in history {
        if let Event::Stored(value, id) | Event::Delivered(_, id, Some(value)) = event {
            pair(*value, id);
        }
    }
    for log in logs {
        for (sequence, entry) in &log.entries {
            if let Some(value) = entry.value {
                pair(value, &log.id(*sequence));
            }
        }
    }
    let several_ids = ids.into_iter().filter(|(_, ids)| ids.len() > 1);
    let several_values = values.into_iter().filter(|(_, values)| values.len() > 1);
    several_ids
        .map(|(value, ids)| Anomaly::SeveralIds { value, ids: ids.into_iter().collect() })
        .chain(several_values.map(|(id, values)| Anomaly::SeveralValues {
            id,
            values: values.into_iter().collect(),
        }))
        .collect()
}

fn reordered(log: &Log) -> Vec<Anomaly> {
    let mut highest: HashMap<u32, (Value, u64)> = HashMap::new();
    let mut anomalies = Vec::new();
    for (sequence, entry) in &log.entries {
        let Some(value) = entry.value else { continue };
        match highest.get(&value.publisher) {
            Some((before, at)) if before.counter > value.counter => {
                anomalies.push(Anomaly::Reordered {
                    first: value,
                    second: *before,
                    id: log.id(*at),
                });
            }
            _ => {
                highest.insert(value.publisher, (value, *sequence));
            }
        }
    }
    anomalies
}

/// Whoever begins after a confirmation comes after it in the log.
fn back_in_time(history: &[Event], logs: &[Log]) -> Vec<Anomaly> {
    let mut confirmed: HashMap<(Arc<str>, u64), u64> = HashMap::new();
    let mut begun: HashMap<Value, HashMap<(Arc<str>, u64), u64>> = HashMap::new();
    for event in history {
        match event {
            Event::Invoked(value, topic) => {
                let of_topic = confirmed.iter().filter(|((name, _), _)| name == topic);
                let floor = || of_topic.map(|(topic, head)| (topic.clone(), *head)).collect();
                begun.entry(*value).or_insert_with(floor);
            }
            Event::Stored(_, id) => {
                let head = confirmed.entry((id.topic.clone(), id.epoch)).or_default();
                *head = id.sequence.max(*head);
            }
            _ => {}
        }
    }
    let mut anomalies = Vec::new();
    for log in logs {
        let topic = (log.topic.clone(), log.epoch);
        for (sequence, entry) in &log.entries {
            let Some(value) = entry.value else { continue };
            let floor = begun.get(&value).and_then(|floors| floors.get(&topic));
            if let Some(floor) = floor.filter(|floor| sequence <= floor) {
                anomalies.push(Anomaly::BackInTime {
                    value,
                    id: log.id(*sequence),
                    confirmed: log.id(*floor),
                });
            }
        }
    }
    anomalies
}
