//! The kubelet's book of what it has given to pods.

use std::collections::BTreeSet;

use device_plugin::checkpoint::{Book, contradiction, decide};
use device_plugin::units::IdScheme;

/// Whatever the file holds: what is no book has a reason that fits into a line of the log; the entries of one that is are in order,
/// and no unit is called by its address while one of them has a number of ours.
pub fn checkpoint(data: &[u8]) {
    let book = Book::parse(data);
    assert_eq!(book, Book::parse(data));
    let ours: BTreeSet<String> = ["nvidia.com/pgpu".to_owned(), "nvidia.com/nvswitch".to_owned()].into();
    let decision = decide(&book, &BTreeSet::new(), &ours, None);
    assert!(!decision.why.code().is_empty());
    let given = match &book {
        Book::Absent => panic!("bytes are a file"),
        Book::Unreadable(cause) => {
            assert!(!cause.is_empty() && cause.len() < 1000, "{cause}");
            assert_eq!(decision.scheme, IdScheme::Iommu, "what is not known may be a number");
            assert!(book.given().is_empty());
            return;
        }
        Book::Read(given) => given,
    };
    assert!(given.is_sorted());
    let is_number = |id: &str| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
    let has_number = given.iter().any(|given| ours.contains(&given.resource) && is_number(&given.id));
    assert_eq!(decision.scheme == IdScheme::Iommu, has_number, "{given:?}");
    let found = contradiction(&book, &ours, IdScheme::Pci);
    assert_eq!(found.is_some(), has_number, "{given:?}");
    for scheme in [IdScheme::Pci, IdScheme::Iommu] {
        if let Some(found) = contradiction(&book, &ours, scheme) {
            assert!(given.contains(&found) && ours.contains(&found.resource), "{found:?}");
        }
    }
}
