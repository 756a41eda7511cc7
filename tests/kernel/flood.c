/*
 * A flood of datagrams of two classes from pod to pod, and the count of what comes of each.
 *
 *   flood SECONDS FORBIDDEN STEADY ADDRESS   sends to two ports of an address
 *   flood SECONDS FORBIDDEN STEADY           receives at these ports
 *
 * The sender sends as fast as it can, each datagram from the next of many source ports, so that each is judged as a new
 * connection. Every fourth goes to STEADY, the others to FORBIDDEN; each carries its number within its class. Both print
 * "ready" once they run, end when their standard input closes, and then print a line for FORBIDDEN and one for STEADY:
 *
 *   sender:   datagrams sent
 *   receiver: datagrams received, the highest number seen plus one, datagrams that the socket had no room for
 *
 * A sender that reads a byte halts, says so when the node has taken in all that it sent, and goes on at the next byte.
 * After SECONDS either is killed by its alarm.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <err.h>
#include <errno.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FORBIDDEN, STEADY, CLASSES };
enum { BATCH = 64, STEADY_EVERY = 4, FIRST_SOURCE = 32768, SOURCES = 16384, ROOM = 64 << 20 };

struct datagram {
	struct udphdr udp;
	uint64_t number;
} __attribute__((packed));

static void say(const char *word)
{
	puts(word);
	fflush(stdout);
}

/* The messages of a batch, each of one piece: elements of an array at FIRST. */
static void point(struct mmsghdr messages[BATCH], struct iovec pieces[BATCH], void *first, size_t size)
{
	for (int i = 0; i < BATCH; i++) {
		pieces[i] = (struct iovec){(char *)first + (size_t)i * size, size};
		messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &pieces[i], .msg_iovlen = 1}};
	}
}

/* A raw socket: of bound ones each source port would need its own. */
static int socket_to(const char *address)
{
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6};
	struct sockaddr_in v4 = {.sin_family = AF_INET};
	const int is_v6 = inet_pton(AF_INET6, address, &v6.sin6_addr) == 1, checksum_at = 6;
	if (!is_v6 && inet_pton(AF_INET, address, &v4.sin_addr) != 1)
		errx(EXIT_FAILURE, "%s is no address", address);
	const int s = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_RAW, IPPROTO_UDP);
	if (s < 0 || (is_v6 && setsockopt(s, IPPROTO_IPV6, IPV6_CHECKSUM, &checksum_at, sizeof checksum_at)) ||
	    connect(s, is_v6 ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4, is_v6 ? sizeof v6 : sizeof v4))
		err(EXIT_FAILURE, "raw socket to %s", address);
	return s;
}

/* Whether to go on sending: what standard input says is heard between batches. */
static int goes_on(int s)
{
	int left = 1;
	char byte;
	if (poll(&(struct pollfd){.fd = STDIN_FILENO, .events = POLLIN}, 1, 0) == 0)
		return 1;
	if (read(STDIN_FILENO, &byte, 1) != 1)
		return 0;
	while (ioctl(s, SIOCOUTQ, &left) == 0 && left)
		sched_yield();
	say("halted");
	return read(STDIN_FILENO, &byte, 1) == 1;
}

static void send_flood(const uint16_t ports[CLASSES], const char *address)
{
	struct datagram datagrams[BATCH];
	struct iovec pieces[BATCH];
	struct mmsghdr messages[BATCH];
	uint64_t sent[CLASSES] = {0}, n = 0;
	const int s = socket_to(address);

	point(messages, pieces, datagrams, sizeof *datagrams);
	while (goes_on(s)) {
		for (int i = 0; i < BATCH; i++, n++) {
			const int class = n % STEADY_EVERY == 0 ? STEADY : FORBIDDEN;
			/* Over the rounds each source port meets each class. */
			const uint64_t source = FIRST_SOURCE + (n + n / SOURCES) % SOURCES;
			datagrams[i].udp = (struct udphdr){.source = htons((uint16_t)source), .dest = htons(ports[class]),
							   .len = htons(sizeof *datagrams)};
			datagrams[i].number = htobe64(sent[class]++);
		}
		for (int done = 0; done < BATCH;) {
			const int taken = sendmmsg(s, messages + done, (unsigned)(BATCH - done), 0);
			if (taken >= 0)
				done += taken;
			else if (errno == ENOBUFS) /* a raw socket does not wait for room */
				sched_yield();
			else
				err(EXIT_FAILURE, "sendmmsg");
		}
		if (n == BATCH)
			say("ready");
	}
	for (int class = 0; class < CLASSES; class++)
		printf("%ju\n", (uintmax_t)sent[class]);
}

static int socket_at(uint16_t port)
{
	const struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	const int room = ROOM, s = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	if (s < 0 || setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) ||
	    bind(s, (const struct sockaddr *)&any, sizeof any))
		err(EXIT_FAILURE, "port %u", port);
	return s;
}

static void receive_flood(const uint16_t ports[CLASSES])
{
	uint64_t received[CLASSES] = {0}, next[CLASSES] = {0}, numbers[BATCH];
	struct iovec pieces[BATCH];
	struct mmsghdr messages[BATCH];
	struct pollfd waiting[CLASSES + 1] = {[CLASSES] = {.fd = STDIN_FILENO}};

	point(messages, pieces, numbers, sizeof *numbers);
	for (int class = 0; class < CLASSES; class++)
		waiting[class] = (struct pollfd){.fd = socket_at(ports[class]), .events = POLLIN};
	say("ready");
	/* What has come when standard input closes is counted. */
	for (int idle = 0; !(idle && waiting[CLASSES].revents);) {
		poll(waiting, CLASSES + 1, -1);
		idle = 1;
		for (int class = 0; class < CLASSES; class++) {
			const int count = recvmmsg(waiting[class].fd, messages, BATCH, 0, NULL);
			if (count < 0 && errno != EAGAIN)
				err(EXIT_FAILURE, "recvmmsg");
			for (int i = 0; i < count; i++, received[class]++, idle = 0)
				if (be64toh(numbers[i]) >= next[class])
					next[class] = be64toh(numbers[i]) + 1;
		}
	}
	for (int class = 0; class < CLASSES; class++) {
		uint32_t memory[SK_MEMINFO_VARS] = {0};
		if (getsockopt(waiting[class].fd, SOL_SOCKET, SO_MEMINFO, memory, &(socklen_t){sizeof memory}))
			err(EXIT_FAILURE, "SO_MEMINFO");
		printf("%ju %ju %u\n", (uintmax_t)received[class], (uintmax_t)next[class], memory[SK_MEMINFO_DROPS]);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4 && argc != 5)
		errx(EXIT_FAILURE, "usage: flood SECONDS FORBIDDEN STEADY [ADDRESS]");
	const uint16_t ports[CLASSES] = {(uint16_t)atoi(argv[2]), (uint16_t)atoi(argv[3])};
	alarm((unsigned)atoi(argv[1]));
	if (argc == 5)
		send_flood(ports, argv[4]);
	else
		receive_flood(ports);
	return EXIT_SUCCESS;
}
