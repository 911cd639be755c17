// What the catalog's client (catalog_client.cpp) and its helper process (helper/) say to each other, and the
// bytes that both hand to LMDB. Private to storage. The two are built and installed together, so the messages
// are plain structs of this machine; what stands in the file has a layout of its own
// (docs/formats/catalog.md), and the client alone knows what it means: the helper needs the place and the
// last use, nothing else.
//
//   client                                      helper
//     spawn with descriptors 3 and 4   ------->   ready
//     open                             ------->   opens or makes the file; outcome
//     read (first), read, ...          ------->   items in the memfd, from its start
//     items in the memfd, then apply   ------->   applied; outcome; the last one of a commit is synced
//     closes its end                   ------->   ends
//
// One message is one packet of a SOCK_SEQPACKET pair; items go through a memfd by pread and pwrite. Neither
// side maps it, so neither can be hurt by the other's cutting it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kvtier::catalog_protocol {

inline constexpr std::uint32_t kProtocol = 1;        // of these messages
inline constexpr std::uint32_t kCatalogVersion = 1;  // of the file
inline constexpr char kFileName[] = "catalog.mdb";
inline constexpr char kLockFileName[] = "catalog.mdb-lock";
inline constexpr int kSocketFd = 3;
inline constexpr int kMemoryFd = 4;

inline constexpr std::size_t kPlaceBytes = 8;
inline constexpr std::size_t kKeyAndGroupBytes = 34;
inline constexpr std::size_t kValueBytes = 88;
inline constexpr std::size_t kPlaceAt = 0;  // in a value
inline constexpr std::size_t kLastUseAt = 24;
inline constexpr std::size_t kLastUseBytes = 8;

enum class ItemKind : std::uint8_t { put, forget, touch };

// A record that was read, or a change to apply. forget: the value's place. touch: its place and last use.
struct Item {
  ItemKind kind = ItemKind::put;
  std::array<std::byte, 5> unused{};
  std::array<std::byte, kKeyAndGroupBytes> key{};
  std::array<std::byte, kValueBytes> value{};
};
static_assert(sizeof(Item) == 128 && std::is_trivially_copyable_v<Item>);

// Items in the memfd at a time: 512 KiB, which stay in a core's cache on both sides (100,000 records in
// pieces of 4 MiB took 60 ms to read, most of it page faults). A commit or a reading of more takes several
// messages.
inline constexpr std::size_t kPieceItems = 4096;

enum class Op : std::uint32_t {
  open,           // opens or makes the file
  make_anew,      // removes what is there; the new file is incomplete (unreadable) until apply_complete
  read_first,     // from the beginning
  read_next,      // the next piece
  apply_more,     // `count` items; the transaction stays open
  apply_last,     // ... and is committed and synced
  apply_complete  // ... and so is the mark that the file is complete
};

struct Request {
  Op op = Op::open;
  std::uint32_t unused = 0;
  std::uint64_t count = 0;
};

enum class Outcome : std::uint32_t { ok, io, corruption };

struct Reply {
  std::uint32_t protocol = kProtocol;
  Outcome outcome = Outcome::ok;
  std::int32_t native_code = 0;  // errno
  std::uint32_t has_more = 0;    // of read
  std::uint64_t count = 0;       // of read: items in this piece
  std::uint64_t total = 0;       // of read: items in all
  std::array<char, 224> text{};  // why; ends with a zero
};
static_assert(sizeof(Reply) == 256);

}  // namespace kvtier::catalog_protocol
